r"""Running a flat objective: one walk that draws, and keeps at every choice what its gradient will need.

Some choices may be *given* other values; all else is then run again with the same random numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import _jax
from expectax.ppl._masked import expand
from expectax.ppl._sample import Site, lanes_of, sample_p
from expectax.ppl._sources import drawn_for_steps, handed_out, planned
from expectax.ppl._visitors import draw_site

from ._layout import Choice, Layout
from ._strategy import Draw, Enum, Reinforce, Reparam
from ._supports import equal_support, joint_support

sg = lax.stop_gradient


class Given(NamedTuple):
    """Values for a choice's elements, where a flag says so; both with the steps of its loops in front."""

    value: Any
    where: Any


class Record(NamedTuple):
    """What a gradient needs of a choice, axes of steps first (those of alternatives before them).

    `score` per element; `weight` of the branch of an enumeration; `values` and `coefficients` of alternatives; the
    elements' `baseline`; a `relaxation`; whether all is `finite`.
    """

    score: Any = None
    weight: Any = None
    values: Any = None
    coefficients: Any = None
    baseline: Any = None
    relaxation: Any = None
    finite: Any = None


class Branch(NamedTuple):
    """Which value of an enumeration a run is about: the vmap axis, the number of values, the one of this run."""

    axis: Any
    size: int
    index: Any


class Runner(NamedTuple):
    """A layout, whether to look for what is not finite, and the branches of the enumerations that are open.

    Choices at the addresses that are `stopped` pass no derivative; for diagnosis.
    """

    layout: Layout
    checked: bool
    branches: dict[int, Branch]
    stopped: frozenset[str] = frozenset()

    def equation(self, eqn: Any, values: list[Any], source: Any, given: Any) -> tuple[list[Any], dict[int, Record]]:
        """Run one equation; `given` is a dict of `Given` by number."""
        if eqn.primitive is sample_p:
            choice = self.layout.choice(eqn)
            value, record = self.choice(choice, eqn.params["site"].split(values), source, given.get(choice.number))
            return [value], {choice.number: record}
        if self.layout.holds(eqn):
            return self._scan(eqn, values, source, given)
        return _jax.bind(eqn, values), {}

    def choice(self, choice: Choice, split: Any, source: Any, given: Given | None) -> tuple[Any, Record]:
        """Draw at a site; return its value and record."""
        site, leaves, extras = split
        if site.address in self.stopped:
            leaves = [sg(x) for x in leaves]
        mask = extras.get("mask")
        if choice.number in self.branches:
            return self._enumerated(choice, site, leaves, mask)
        beside = None
        if takes_key(choice.site):
            source, beside = jax.random.split(source)
        value = draw_site(site, leaves, source)
        if isinstance(choice.strategy, Reparam):
            record = Record()
        elif isinstance(choice.strategy, Enum):
            value, record = sg(value), _local(site, leaves, mask)
        elif isinstance(choice.strategy, Reinforce):
            value = sg(value)
            score = counted(site.log_density(value, leaves), mask)
            record = Record(score=score, baseline=_numbers(choice, site))
        else:
            value, record = _coupled(choice, site, leaves, sg(value), beside, mask)
        if given is not None:
            value = jnp.where(expand(given.where, value), given.value, value)
        if self.checked:
            record = record._replace(finite=all_finite(value, *leaves))
        return value, record

    def _enumerated(self, choice: Choice, site: Site, leaves: Any, mask: Any) -> tuple[Any, Record]:
        """Return the value of the present branch, with its probability (of each element, if by lanes)."""
        branch = self.branches[choice.number]
        by_lanes = choice.mode == "lanes"
        values = equal_support(site, leaves) if by_lanes else joint_support(site, leaves)
        log_probs = jax.vmap(lambda x: site.log_density(x, leaves))(values)
        if not by_lanes:
            log_probs = jnp.sum(log_probs.reshape(len(values), -1), axis=1)
        possible = log_probs > jnp.log(jnp.finfo(log_probs.dtype).tiny) + 1.0
        probs = jnp.where(possible, jnp.exp(jnp.where(possible, log_probs, 0.0)), 0.0)
        # an impossible value is replaced by a possible one, whose cost and derivatives are finite
        best = jnp.argmax(log_probs, axis=0)
        likely = jnp.take_along_axis(values, expand(best, values[0])[None], axis=0)[0]
        value = jnp.where(expand(possible[branch.index], likely), values[branch.index], likely)
        finite = all_finite(*leaves) if self.checked else None
        return value, Record(weight=probs[branch.index], finite=finite)

    def _scan(self, eqn: Any, values: list[Any], key: Any, given: Any) -> tuple[list[Any], dict[int, Record]]:
        """Run a scan with choices; what they record gets an axis of steps."""
        num_consts, num_carry = _jax.scan_sizes(eqn)
        body, params = eqn.params["jaxpr"], eqn.params
        consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]
        here = {n: given[n] for n in self.layout.numbers(eqn) if n in given}
        noise, sources_of_step = noise_of_steps(body, key, params["length"])

        def step(carry: Any, inputs: Any) -> Any:
            own_noise, own_given, x = inputs
            outputs, records = self._body(body, [*consts, *carry, *x], sources_of_step(own_noise), own_given)
            return outputs[:num_carry], (outputs[num_carry:], records)

        carry, (ys, records) = lax.scan(
            step, carry, (noise, here, xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
        )
        return [*carry, *ys], {n: _steps_after_alternatives(record) for n, record in records.items()}

    def _body(self, body: Any, args: Any, sources: Iterator[Any], given: Any) -> tuple[list[Any], dict[int, Record]]:
        env, opened = _jax.Environment.of(body, args), _jax.close(body)[0]
        records: dict[int, Record] = {}
        for eqn in opened.eqns:
            own = next(sources) if draws(eqn) else None
            outputs, new = self.equation(eqn, [env.read(v) for v in eqn.invars], own, given)
            env.update(zip(eqn.outvars, outputs, strict=True))
            records |= new
        return [env.read(v) for v in opened.outvars], records


def draws(eqn: Any) -> bool:
    """Tell whether an equation makes choices."""
    return eqn.primitive is sample_p or _jax.holds(eqn, sample_p)


def takes_key(site: Site) -> bool:
    """Tell whether a site's strategy wants a key of its own."""
    return not isinstance(site.gradient, (Reparam, Reinforce, Enum))


def noise_of_steps(body: Any, key: Any, length: int) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Draw the noise of a scan's steps ahead of it; the function makes a step's sources of its part."""
    plan = planned(_jax.close(body)[0].eqns, keyed=takes_key)
    noise, of_step = drawn_for_steps(plan, key, length)
    return noise, lambda own: itertools.chain(*handed_out(plan, of_step(own)))


def counted(terms: Any, mask: Any) -> Any:
    """Return what each element has to say, 0 where its branch is not taken."""
    return terms if mask is None else jnp.where(mask, terms, 0.0)


def all_finite(*values: Any) -> Any:
    """Tell whether all numbers are finite."""
    floats = [v for v in values if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(v)) for v in floats])) if floats else jnp.asarray(True)


def _numbers(choice: Choice, site: Site) -> Any:
    """Return a baseline per element, or None where there is none or it is the other samples'."""
    baseline = choice.strategy.baseline
    if baseline == "operand":
        baseline = site.gradient.baseline
    if baseline is None or isinstance(baseline, str):
        return None
    return jnp.broadcast_to(jnp.asarray(baseline, jnp.result_type(float)), choice.site.element_shape)


def _local(site: Site, leaves: Any, mask: Any) -> Record:
    """Take all values of a finite support for alternatives, with their probabilities."""
    values = equal_support(site, leaves)
    probs = jnp.exp(jax.vmap(lambda x: site.log_density(x, leaves))(values))
    return Record(values=values, coefficients=counted(probs, mask))


def _coupled(choice: Choice, site: Site, leaves: Any, value: Any, key: Any, mask: Any) -> tuple[Any, Record]:
    """Let a strategy look at each lane of a draw, with a key of its own."""

    def one(value: Any, key: Any, leaves: Any) -> Any:
        d = site.distribution(leaves)
        return _in_arrays(choice, choice.strategy.couple(d, value, key), d)

    keys = jax.random.split(own_key(key), site.value_shape[: len(site.lanes)])
    new, score, values, coefficients, relaxation = lanes_of(site, one, value, keys, leaves=leaves)
    lanes = len(site.lanes)
    if values is not None:
        values, coefficients = (jnp.moveaxis(x, lanes, 0) for x in (values, coefficients))
        coefficients = counted(coefficients, mask)
    score = None if score is None else counted(score, mask)
    return new, Record(score=score, values=values, coefficients=coefficients, relaxation=relaxation)


def own_key(key: Any) -> Any:
    """Return another key in each of the library's lanes."""
    for name in _jax.lane_axes():
        key = jax.random.fold_in(key, _jax.axis_index(name))
    return key


def _in_arrays(choice: Choice, draw: Draw, d: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Return value, score, alternatives and coefficients of one lane as arrays of the right shapes."""
    site, batch = choice.site, tuple(d.batch_shape)
    value = jnp.asarray(draw.value, site.dtype)
    score = None if draw.score is None else jnp.broadcast_to(draw.score, batch)
    values = coefficients = None
    if draw.alternatives:
        values = jnp.stack([jnp.broadcast_to(jnp.asarray(x, site.dtype), site.shape) for x, _ in draw.alternatives])
        numbers = [jnp.asarray(c, jnp.result_type(float)) for _, c in draw.alternatives]
        coefficients = jnp.stack([jnp.broadcast_to(c, batch) for c in numbers])
    return value, score, values, coefficients, draw.relaxation


def _steps_after_alternatives(record: Record) -> Record:
    if record.values is None:
        return record
    values, coefficients = (jnp.moveaxis(x, 1, 0) for x in (record.values, record.coefficients))
    return record._replace(values=values, coefficients=coefficients)
