"""Where does the first number that is not finite come from?"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._distribution import lane_shape
from ._evaluate import Visit, Visitor
from ._nested import Choices, leaves_of
from ._posterior import Posterior
from ._program import Program, program_of
from ._sample import Site, lanes_of
from ._staging import check_key, stage
from ._table import Entry
from ._visitors import assessing, generating


@dataclasses.dataclass(frozen=True)
class Finding:
    """What `debug` found. Example: see `debug`.

    Attributes:
        address: the path of the first site with a number that is not finite.
        place: file and line of the site.
        index: which element (time, lanes, batch); `()` for a scalar site.
        what: `"a parameter"`, `"the value"` or `"the log density"`.
        distribution: its name.
        parameters: the distribution's parameters there.
        value: the value there.
        log_density: the log density there.
    """

    address: str
    place: str
    index: tuple[int, ...]
    what: str
    distribution: str
    parameters: dict[str, Any]
    value: Any
    log_density: float

    def __repr__(self) -> str:
        """Say it in a sentence."""
        where = f"{list(self.index)}" if self.index else ""
        inputs = ", ".join(f"{name}={np.array2string(np.asarray(x))}" for name, x in self.parameters.items())
        return (
            f"{self.what} of site {self.address!r}{where} (at {self.place}) is not finite: {self.distribution}({inputs}), "
            f"value {np.array2string(np.asarray(self.value))}, log density {self.log_density}."
        )


class _Record(eqx.Module):
    """What a site has met; `kind` tells by element which of the distributions of its address it was."""

    kind: Any
    parameters: tuple[dict[str, Any], ...]
    value: Any
    log_density: Any


_Kind = tuple[str, str, tuple[Any, ...]]
"""A distribution's name, its place, and name, shape and dtype of its parameters."""


def debug(target: Program | Posterior, choices: Choices | None = None, *, key: Any = None) -> Finding | None:
    """Find the first site, in program order, with a parameter, value or log density that is not finite.

    Args:
        target: a bound program, or a posterior.
        choices: all choices of the program, or all latents of the posterior; None to draw them.
        key: a typed key, if they are drawn.

    Returns:
        A `Finding` that prints as a sentence, or None if all numbers are finite.

    Raises:
        AddressError, ShapeError: the choices do not fit.
        TypeError: neither choices nor a key are given.
        ControlFlowError: the program is one of `marginalize_discrete`, whose sites have no densities of their own.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def bad():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(0.0, x))
        >>> finding = ex.debug(bad(), {"x": 0.0, "y": 1.0})
        >>> finding.address, finding.what
        ('y', 'the log density')
    """
    program_of(target, "debug")
    posterior = target if isinstance(target, Posterior) else target.given({})
    staged = stage(posterior.program)
    if choices is None:
        check_key(key)
        source, given, base = key, posterior.observations, generating
    else:
        source, given, base = None, posterior._complete(staged, choices, "debug"), assessing

    known: dict[str, list[_Kind]] = {}  # several of an address that stands in several branches

    def look(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
        kinds = known.setdefault(site.address, [])
        kinds += [kind for kind in [_kind(site, _parameters(site, leaves))] if kind not in kinds]
        return base.visit(site, leaves, source, given, mask)

    def inspect(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
        visit = base.visit(site, leaves, source, given, mask)
        return visit._replace(record=_inspected(site, leaves, visit, known[site.address]))

    jax.eval_shape(lambda: staged.run(Visitor(look), source, given).log_density)
    outcome = staged.run(Visitor(inspect, fixed=True), source, given)
    entries, present = dict(leaves_of(staged.table)), dict(leaves_of(outcome.present))
    for path, record in leaves_of(outcome.choices):
        finding = _first(path, entries[path], known, jax.tree.map(np.asarray, record), present.get(path, True))
        if finding is not None:
            return finding
    return None


def _first(path: str, entry: Entry, known: dict[str, list[_Kind]], record: _Record, present: Any) -> Finding | None:
    """Return what is not finite at one site."""
    elements = len(entry.elements)
    bad = {
        "a parameter": [p for own in record.parameters for p in own.values()],
        "the value": [record.value],
        "the log density": [record.log_density],
    }
    for what, arrays in bad.items():
        flags = [_per_element(~np.isfinite(a), elements) for a in arrays if a.dtype.kind == "f"]
        if flags and (found := np.logical_or.reduce(flags) & np.asarray(present)).any():
            index = tuple(int(i) for i in np.argwhere(found)[0])
            kind = int(record.kind[index])
            name, place, _ = known[entry.site.address][kind]
            inputs = {n: p[index] for n, p in record.parameters[kind].items()}
            density = float(record.log_density[index])
            return Finding(path, place, index, what, name, inputs, record.value[index], density)
    return None


def _per_element(flags: np.ndarray, elements: int) -> np.ndarray:
    return np.asarray(flags.any(axis=tuple(range(elements, flags.ndim))))


def _parameters(site: Site, leaves: Any) -> dict[str, Any]:
    """Return a site's parameters, each with the site's elements in front."""

    def parameters(leaves: Any) -> dict[str, Any]:
        d = site.distribution(leaves)
        inner: Any = d
        while not inner.arg_constraints and hasattr(inner, "base_dist"):
            inner = inner.base_dist
        found = {}
        for name, constraint in inner.arg_constraints.items():
            p = inner.__dict__.get(name)
            if p is not None:
                own = jnp.shape(p)[jnp.ndim(p) - constraint.event_dim :]
                try:
                    found[name] = jnp.broadcast_to(p, (*d.batch_shape, *own))
                except ValueError:  # of a part that `to_event` has made the event
                    found[name] = jnp.broadcast_to(jnp.sum(p), d.batch_shape)
        return found

    return lanes_of(site, parameters, leaves=leaves)


def _kind(site: Site, named: dict[str, Any]) -> _Kind:
    name = type(site.distribution([None] * site.structure.num_leaves)).__name__
    return name, site.where, tuple((n, jnp.shape(p), jnp.result_type(p)) for n, p in sorted(named.items()))


def _inspected(site: Site, leaves: Any, visit: Visit, kinds: list[_Kind]) -> _Record:
    """Return parameters, value and log density, each with the site's elements in front; 0 for other distributions'."""
    named = _parameters(site, leaves)
    own = kinds.index(_kind(site, named))
    parameters = tuple(
        named if number == own else {n: jnp.zeros(shape, dtype) for n, shape, dtype in shapes}
        for number, (*_, shapes) in enumerate(kinds)
    )
    elements = lane_shape(site.lanes) + tuple(site.distribution([None] * site.structure.num_leaves).batch_shape)
    return _Record(jnp.full(elements, own), parameters, visit.value, jnp.broadcast_to(visit.log_density, elements))
