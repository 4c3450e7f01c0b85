"""Progress between the chunks of a long run: it never changes the draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, label: str, shown: bool) -> Iterator[Any]:
    """Show a bar of `total` steps; the value is called with `(steps done, note)`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets a plain bar is shown: no need to say so
        from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, disable=not shown, leave=False, miniters=1) as bar:

        def advance(steps: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(steps)

        yield advance


def chunks(total: int, most: int = 20, least: int = 100) -> tuple[int, int]:
    """Return `(length, number)` of equal chunks that cover `total` steps, the last perhaps partly used."""
    length = max(min(least, total), -(-total // most))
    return length, -(-total // length)
