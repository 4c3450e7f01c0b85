"""A model whose time axis is one `lax.scan`, cut at the scan: for filters, which weigh it step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import _jax
from ._errors import ControlFlowError
from ._sample import sample_p
from ._table import has_sites


class Cut(NamedTuple):
    """A flat model cut at its scan; `shared` are equations whose results no latent touches."""

    shared: list[Any]
    before: list[Any]
    scan: Any
    after: list[Any]
    particle: set[Any]


def cut_at_scan(jaxpr: Any, what: str) -> Cut:
    """Cut the equations at the scan, and find which variables differ between particles."""
    scans = [e for e in jaxpr.eqns if e.primitive in _jax.SCAN and _jax.holds(e, sample_p)]
    if len(scans) != 1:
        places = ", ".join(_jax.place(e) for e in scans)
        raise ControlFlowError(
            f"{what} needs a model with exactly one lax.scan that holds sites, outside nested models; found "
            f"{len(scans)}{': ' + places if places else ''}. Write the time axis as one scan."
        )
    at = jaxpr.eqns.index(scans[0])
    cut = Cut([], [], scans[0], [], set())
    for number, eqn in enumerate(jaxpr.eqns):
        touched = any(v in cut.particle for v in eqn.invars if not isinstance(v, _jax.Literal))
        if number == at or touched or has_sites(eqn):
            cut.particle.update(eqn.outvars)
            if number != at:
                (cut.before if number < at else cut.after).append(eqn)
        else:
            cut.shared.append(eqn)
    return cut
