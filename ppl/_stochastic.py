r"""Choices whose density is only estimated, as one equation of a program.

The equation holds two keyless programs that share an auxiliary variable $a$: `draw` returns $x$ with $w$,
`estimate` takes $x$ and returns $w$, such that for every $g \ge 0$

$$E_{(x, w) \sim \text{draw}}[g(x, w)] = \int E_{w \sim \text{estimate}(x)}[e^w g(x, w)]\, dx.$$

Both are mapped when JAX maps the equation, so that each lane has auxiliary draws of its own.

Source: Lew et al. 2023 (RAVI); Becker et al., PLDI 2024, section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import distributions as dist

from . import _jax
from ._distribution import Lane
from ._errors import ControlFlowError, DistributionError, OutsideModelError, SupportError
from ._evaluate import NOTHING, Observed, Outcome, Unweighed, Visitor, evaluate, plain
from ._masked import Masked, expand
from ._nested import Choices, leaves_of, nested
from ._sample import sample_p
from ._table import Entry
from ._visitors import Partial, generating, rebinding


class Density(NamedTuple):
    """The fixed part of the equation: its operands are those of `draw` (the first `cut`) and of `estimate`."""

    draw: Any  # operands -> log weight, choices in the order of `paths`
    estimate: Any  # operands, choices -> log weight
    entries: tuple[tuple[str, Entry], ...]
    cut: int

    @property
    def exact(self) -> bool:
        """Whether the density is a number, with no randomness in it."""
        return not _jax.contains(self.estimate, sample_p)

    @property
    def named(self) -> str:
        """The choices, for messages."""
        site = self.entries[0][1].site
        return f"{', '.join(repr(path) for path, _ in self.entries)} (at {site.where})"


def bind_stochastic(
    draw: Callable[[], tuple[Choices, Any]], estimate: Callable[[Choices], Any], entries: dict[str, Entry]
) -> Choices:
    """Make choices with an estimated density in the enclosing program; the two functions are keyless programs."""
    paths = tuple(entries)
    flat = lambda choices: [jnp.asarray(dict(leaves_of(choices))[path]) for path in paths]  # noqa: E731

    def drawn() -> list[Any]:
        choices, log_weight = draw()
        return [_weight(log_weight), *flat(choices)]

    def estimated(*values: Any) -> Any:
        return _weight(estimate(nested(zip(paths, values, strict=True))))

    types = [jax.ShapeDtypeStruct(entry.shape, entry.dtype) for entry in entries.values()]
    draws, own = _jax.opened(jax.make_jaxpr(drawn)())
    estimates, others = _jax.opened(jax.make_jaxpr(estimated)(*types))
    density = Density(draws, estimates, (), len(own))
    flags = {"joint": True, "estimated": not density.exact}
    marked = tuple((path, entry._replace(**flags)) for path, entry in entries.items())
    density = density._replace(entries=marked)
    values = stochastic_p.bind(*own, *others, density=density)
    return nested(zip(paths, values, strict=True))


def _weight(value: Any) -> Any:
    if jnp.shape(value) != ():
        raise DistributionError(f"a log weight is a scalar, got shape {jnp.shape(value)} at {_jax.caller()}.")
    return jnp.asarray(value, jnp.result_type(float))


# --- the equation -----------------------------------------------------------------------------------------------


def _abstract(*_: Any, density: Density) -> Any:
    return [_jax.ShapedArray(entry.shape, entry.dtype) for _, entry in density.entries]


def _batch(axis: Any, args: Any, dims: Any, *, density: Density) -> Any:
    """Map both programs; a choice gets its lanes behind its time axes, and in front of the others."""
    places = [len(entry.times) for _, entry in density.entries]
    draws = _jax.over_axis(density.draw, axis, dims[: density.cut], out_axes=[0, *places])
    estimates = _jax.over_axis(density.estimate, axis, [*dims[density.cut :], *places])
    entries = tuple((path, _in_lanes(entry, axis.size)) for path, entry in density.entries)
    mapped = Density(draws, estimates, entries, density.cut)
    return stochastic_p.bind(*args, density=mapped), places


def _in_lanes(entry: Entry, size: int) -> Entry:
    site = entry.site
    lane = Lane(size, (None,) * (site.structure.num_leaves + len(site.extras)))
    return entry._replace(site=dataclasses.replace(site, lanes=(*site.lanes, lane)))


def _outside(*_: Any, density: Density, **__: Any) -> Any:
    raise OutsideModelError(
        f"the choices {density.named} with an estimated density, met at {_jax.caller()}, ran outside a model. Call a "
        "method of the bound program, such as simulate(key), or use vi.simulate in an objective."
    )


def _jvp(primals: Any, tangents: Any, *, density: Density) -> Any:
    del primals, tangents
    raise ControlFlowError(
        f"the choices {density.named} with an estimated density, met at {_jax.caller()}, stand inside a derivative "
        "(jax.grad, jax.jvp), where a random choice has none. Use vi.value_and_grad."
    )


stochastic_p = _jax.define_primitive(
    "stochastic",
    abstract=_abstract,
    batch=_batch,
    implementation=_outside,
    lowering=_outside,
    jvp=_jvp,
    multiple_results=True,
    site=True,
)


# --- its rule in the interpreter --------------------------------------------------------------------------------


def evaluate_stochastic(eqn: Any, values: Any, visitor: Visitor, key: Any, given: Choices, mask: Any) -> Outcome:
    """Draw the choices with their weight, or estimate the density of given ones."""
    density: Density = eqn.params["density"]
    own, others = values[: density.cut], values[density.cut :]
    known = dict(leaves_of(given))
    asked = {path: known.get(path) for path, _ in density.entries}
    if all(x is None for x in asked.values()) and visitor.kind in ("generate", "rebind"):
        inner = generating if visitor.kind == "generate" else rebinding
        log_weight, *choices = evaluate(density.draw, own, inner, key, mask=mask).outputs
        return _outcome(density, choices, choices, _total(log_weight, mask), 0.0, mask)
    if visitor.kind in ("weigh", "project"):
        asked, wanted = _wanted(asked)
        if not wanted:
            return _outcome(density, list(asked.values()), list(asked.values()), 0.0, 0.0, mask)
    if visitor.kind not in ("generate", "rebind", "assess", "weigh", "project", "record", "constrain", "unconstrain"):
        raise ControlFlowError(
            f"the choices {density.named} have one density together, estimated or summed, which this cannot look into. "
            "Apply it to the program that vi.marginal or vi.normalize is made of."
        )
    _refuse_parts(density, asked, visitor)
    if visitor.kind == "unconstrain":
        return _unconstrained(density, asked, mask)
    choices, log_jacobian = _in_space(density, asked, visitor, mask)
    safe = [_possible(entry, x, mask) for (_, entry), x in zip(density.entries, choices, strict=True)]
    if visitor.weightless:
        return _outcome(density, choices, choices, 0.0, 0.0, mask)
    log_weight = _estimated(density, [*others, *safe], visitor, key, mask)
    total = _total(log_weight, mask)
    records = choices if visitor.kind != "record" else [_elementwise(density, log_weight)]
    return _outcome(density, choices, records, total, total + log_jacobian, mask)


def _estimated(density: Density, values: Any, visitor: Visitor, key: Any, mask: Any) -> Any:
    if density.exact or key is not None:
        inner = generating
    elif visitor.kind == "rebind" or visitor.binds:
        inner = rebinding
    else:
        raise DistributionError(
            f"the density of {density.named} is only estimated, which takes randomness: use generate(key, choices), or "
            "give a key: assess(choices, key=key), log_density(latents, key=key). In an objective use vi.log_density."
        )
    (log_weight,) = evaluate(density.estimate, values, inner, key, mask=mask).outputs
    return log_weight


def _wanted(asked: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the choices of which all is wanted or nothing, as whole values; and whether any is wanted."""
    flags = {path: _flag(x) for path, x in asked.items()}
    if len(set(flags.values())) > 1 or None in flags.values():
        return asked, True
    return {p: x.value if isinstance(x, Masked) else plain(x) for p, x in asked.items()}, True in flags.values()


def _flag(value: Any) -> bool | None:
    """Return whether a choice is wanted; None where it is in part, or is not known yet."""
    if not isinstance(value, Masked):
        return not isinstance(value, Unweighed)
    if _jax.is_traced(value.mask):
        return None
    flags = np.asarray(value.mask)
    return None if flags.any() and not flags.all() else bool(flags.all())


def _refuse_parts(density: Density, asked: dict[str, Any], visitor: Visitor) -> None:
    """Refuse what would need the density of a part of the choices."""
    missing = [path for path, x in asked.items() if x is None]
    partial = [path for path, x in asked.items() if isinstance(x, (Masked, Partial))]
    if missing or partial:
        raise DistributionError(
            f"the choices {density.named} have one density together: give all of them, whole, or none. "
            + (f"Not given: {', '.join(map(repr, missing))}. " if missing else "")
            + (f"Given or selected in part: {', '.join(map(repr, partial))}. " if partial else "")
            + "(To integrate over a part of them: vi.sir with a proposal.)"
        )
    if visitor.kind in ("weigh", "project") and not density.exact:
        raise DistributionError(
            f"the density of {density.named} is only estimated, so that it has no value of its own in a trace that "
            "exists: regenerate and project cannot be followed here. Use update, or generate."
        )


def _in_space(density: Density, asked: dict[str, Any], visitor: Visitor, mask: Any) -> tuple[list[Any], Any]:
    """Return the given choices in their supports, and the log Jacobian where they came from unconstrained space."""
    choices, total = [], 0.0
    for path, entry in density.entries:
        value = asked[path]
        if isinstance(value, Observed) or visitor.kind != "constrain":
            choices.append(value.value if isinstance(value, Observed) else value)
            continue
        bijection = _bijection(path, entry)
        choices.append(bijection(value))
        jacobian = bijection.log_abs_det_jacobian(value, choices[-1])
        counted = jacobian if mask is None else jnp.where(_along(mask, jacobian, entry), jacobian, 0.0)
        total = total + jnp.sum(counted)
    return choices, total


def _unconstrained(density: Density, asked: dict[str, Any], mask: Any) -> Outcome:
    choices, records = [], []
    for path, entry in density.entries:
        value = asked[path]
        own = value.value if isinstance(value, Observed) else value
        choices.append(own)
        records.append(own if isinstance(value, Observed) else _bijection(path, entry).inv(own))
    return _outcome(density, choices, records, 0.0, 0.0, mask)


def _bijection(path: str, entry: Entry) -> Any:
    support = entry.site.support
    try:
        assert support is not None
        return dist.biject_to(support)
    except (AssertionError, NotImplementedError) as error:
        raise SupportError(
            f"site {path!r} at {entry.site.where}: its density is an estimate or a sum, and its support "
            f"({'depends on parameters' if support is None else support}) has no fixed map from the reals. Observe it."
        ) from error


def _possible(entry: Entry, value: Any, mask: Any) -> Any:
    """Return a choice with something possible where it does not count: nan there would spoil derivatives."""
    if mask is None:
        return value
    support = entry.site.support
    other = jnp.zeros_like(value) if support is None else support.feasible_like(value)
    return jnp.where(_along(mask, value, entry), value, lax.stop_gradient(jnp.asarray(other, value.dtype)))


def _along(mask: Any, value: Any, entry: Entry) -> Any:
    """Return a mask of the outermost lanes along the elements of a choice, whose lanes stand behind its time axes."""
    return expand(jnp.reshape(mask, (1,) * len(entry.times) + jnp.shape(mask)), value)


def _total(terms: Any, mask: Any) -> Any:
    return jnp.sum(terms if mask is None else jnp.where(expand(mask, terms), terms, 0.0))


def _elementwise(density: Density, log_weight: Any) -> Any:
    """Return the densities of a choice's elements, if they are those of its lanes."""
    elements = [entry.elements for _, entry in density.entries]
    if len(elements) > 1 or math.prod(elements[0]) != jnp.size(log_weight):
        raise DistributionError(f"the choices {density.named} have no densities one by one, only one together.")
    return jnp.reshape(log_weight, elements[0])


def _outcome(
    density: Density, choices: list[Any], records: list[Any], log_density: Any, log_weight: Any, mask: Any
) -> Outcome:
    paths = [path for path, _ in density.entries]
    present = {}
    if mask is not None:
        for path, entry in density.entries:
            present[path] = jnp.broadcast_to(_along(mask, jnp.zeros(entry.elements), entry), entry.elements)
    return NOTHING._replace(
        outputs=choices,
        choices=nested(zip(paths, records, strict=True)),
        log_density=log_density,
        log_weight=log_weight,
        present=nested(present.items()),
    )
