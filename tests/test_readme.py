"""The README's Python blocks run as they stand."""

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 3
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the centred model's divergences, which the text explains
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    assert abs(float(names["cloud"].log_evidence) - -31.31) < 0.2
    assert abs(float(names["filtered"].log_evidence) - names["kalman"](names["NILE"]).log_evidence) < 0.5


@pytest.mark.slow
def test_code_blocks_of_the_page_on_marginals_run():
    page = README.parent / "docs" / "marginals.md"
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), names)
    assert abs(float(names["vi"].estimate(names["bound"], names["fit"].params, names["key"]).mean) - -8.18) < 0.1
    assert names["chains"].choices["mean"].shape == (4, 1000)


@pytest.mark.slow
def test_code_blocks_of_the_page_on_inference_run():
    page = README.parent / "docs" / "inference.md"
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a divergence in a short run
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(compile(block, str(page), "exec"), names)
    assert abs(float(names["again"].log_evidence) - float(names["filtered"].log_evidence)) < 0.3
    assert names["more"].choices["mu"].shape == (4, 1000) and names["check"].p_value > 1e-6
