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
    parameters: dict[str, Any]
    value: Any
    log_density: Any


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

    def inspect(site: Site, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
        visit = base.visit(site, leaves, source, given, mask)
        return visit._replace(record=_inspected(site, leaves, visit))

    outcome = staged.run(Visitor(inspect, fixed=True), source, given)
    entries, present = dict(leaves_of(staged.table)), dict(leaves_of(outcome.present))
    for path, record in leaves_of(outcome.choices):
        entry = entries[path]
        parameters, value, log_density = (jax.tree.map(np.asarray, x) for x in vars(record).values())
        bad = {"a parameter": list(parameters.values()), "the value": [value], "the log density": [log_density]}
        for what, arrays in bad.items():
            flags = [_per_element(~np.isfinite(a), len(entry.elements)) for a in arrays if a.dtype.kind == "f"]
            here = np.asarray(present.get(path, True))
            if flags and (found := np.logical_or.reduce(flags) & here).any():
                index = tuple(int(i) for i in np.argwhere(found)[0])
                name = type(entry.site.distribution([None] * entry.site.structure.num_leaves)).__name__
                inputs = {n: p[index] for n, p in parameters.items()}
                density = float(log_density[index])
                return Finding(path, entry.site.where, index, what, name, inputs, value[index], density)
    return None


def _per_element(flags: np.ndarray, elements: int) -> np.ndarray:
    return np.asarray(flags.reshape(*flags.shape[:elements], -1).any(axis=-1))


def _inspected(site: Site, leaves: Any, visit: Visit) -> _Record:
    """Return parameters, value and log density, each with the site's elements in front."""

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

    named = lanes_of(site, parameters, leaves=leaves)
    elements = lane_shape(site.lanes) + tuple(site.distribution([None] * site.structure.num_leaves).batch_shape)
    return _Record(named, visit.value, jnp.broadcast_to(visit.log_density, elements))
