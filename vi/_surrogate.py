r"""The estimator as a surrogate: one number whose value estimates $E[f]$ and whose `jax.grad`, of any order, its gradient.

With $\text{sg}$ for stop-gradient and $k$ for the rest of the program: a reparametrised site goes on with
$x = g(\epsilon, \theta)$; a score-function site draws $x$ and multiplies the costs that depend on it by
$\exp(\tau - \text{sg}\,\tau)$, $\tau = \log p(x;\theta)$ (DiCE, Foerster et al. 2018); an enumerated site returns
$\sum_i p(x_i;\theta)\, k(x_i)$, with $k$ run under one vmap (ADEV, Lew et al. 2023).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import _jax
from expectax.ppl._flow import Dependence, flow, lane_mover, merge, mixed, moved, of
from expectax.ppl._sample import Site, sample_p
from expectax.ppl._sources import drawn_for_steps, handed_out, planned, sources
from expectax.ppl._visitors import draw_site

from ._boxes import Samples, Score, boxed_sum
from ._strategy import Enum, Reinforce, joint_support

sg = lax.stop_gradient


class Check(NamedTuple):
    """Whether all that happened at a site is finite; steps of a scan are joined."""

    address: str
    finite: Any


class State(NamedTuple):
    """What is known when the walk stands at an equation."""

    env: _jax.Environment
    depends: dict[Any, Dependence]
    scores: dict[int, Score]
    samples: Samples | None

    def branch(self, axis: Any, probability: Any) -> State:
        """Return a copy that a continuation may change, one branch of an enumeration."""
        samples = self.samples
        if samples is not None:
            samples = samples._replace(branches=(*samples.branches, (axis, probability)))
        return State(_jax.Environment(self.env), dict(self.depends), dict(self.scores), samples)


def surrogate(
    jaxpr: Any, args: Any, key: Any, samples: Samples | None = None, checks: list[Check] | None = None
) -> Any:
    """Return the surrogate of a flat objective.

    Args:
        jaxpr: closed, made by `flatten`; its one output is a scalar.
        args: its arguments.
        key: a typed key.
        samples: the vmap axis of independent samples, for leave-one-out baselines.
        checks: a list to fill with one `Check` per site, for diagnosis.
    """
    opened = jaxpr.jaxpr
    found = sources(opened.eqns, key, _sampled)
    of_equation = {i: next(found) for i, eqn in enumerate(opened.eqns) if _draws(eqn)}
    walk = _Walk(opened, of_equation, checks)
    return walk.run(0, State(_jax.Environment.of(jaxpr, args), {}, {}, samples))


def _draws(eqn: Any) -> bool:
    return eqn.primitive is sample_p or _jax.holds(eqn, sample_p)


def _sampled(site: Site) -> bool:
    return not isinstance(site.gradient, Enum)


class _Walk:
    """The walk over one flat jaxpr; `run(i, state)` is the rest of the program from equation `i`."""

    def __init__(self, jaxpr: Any, sources: dict[int, Any], checks: list[Check] | None):
        self.jaxpr, self.sources, self.checks = jaxpr, sources, checks

    def run(self, start: int, state: State) -> Any:
        for i in range(start, len(self.jaxpr.eqns)):
            eqn = self.jaxpr.eqns[i]
            values = [state.env.read(v) for v in eqn.invars]
            inputs = [of(state.depends, v) for v in eqn.invars]
            if eqn.primitive is sample_p:
                site, values, mask = masked_site(eqn, values)
                inputs = inputs[: len(values)]
                if isinstance(site.gradient, Enum):
                    return self._enumerate(i, site, values, inputs, state)
                outputs, depends = [self._site(i, site, values, state, mask)], [_at_site(i, site, values, inputs)]
            elif i in self.sources:
                outputs, depends = self._scan(i, eqn, values, inputs, state)
            else:
                outputs, depends = _jax.bind(eqn, values), flow(eqn, inputs)
                self._check(_jax.tagged(eqn), *outputs)
            state.env.update(zip(eqn.outvars, outputs, strict=True))
            state.depends.update((v, d) for v, d in zip(eqn.outvars, depends, strict=True) if d)
        return boxed_sum(self.jaxpr, state.env, state.depends, state.scores, state.samples)

    def _check(self, address: str | None, *values: Any) -> None:
        if self.checks is not None and address is not None:
            finite = [jnp.all(jnp.isfinite(v)) for v in values if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]
            self.checks.append(Check(address, jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)))

    def _site(self, i: int, site: Site, leaves: list[Any], state: State, mask: Any) -> Any:
        """Draw at a reparametrised or score-function site."""
        value = draw_site(site, leaves, self.sources[i])
        if isinstance(site.gradient, Reinforce):
            value = sg(value)
            state.scores[i] = Score(element_scores(site, value, leaves, mask), False, site.gradient)
        self._check(site.address, value, *leaves)
        return value

    def _enumerate(self, i: int, site: Site, leaves: list[Any], inputs: list[Dependence], state: State) -> Any:
        """Sum the rest of the program over all joint values of a site."""
        values = joint_support(site, leaves)
        self._check(site.address, *leaves)
        log_probs = jax.vmap(lambda x: jnp.sum(site.log_density(x, leaves)))(values)
        depends = mixed(_at_site(i, site, leaves, inputs, scored=False))

        possible = log_probs > jnp.log(jnp.finfo(log_probs.dtype).tiny) + 1.0
        probs = jnp.where(possible, jnp.exp(jnp.where(possible, log_probs, 0.0)), 0.0)
        # an impossible value is replaced by a possible one, whose cost and derivatives are finite
        tried = jnp.where(_like(possible, values), values, values[jnp.argmax(log_probs)])
        axis = _Branch(i)

        def rest(value: Any, probability: Any) -> Any:
            inner = state.branch(axis, sg(probability))
            inner.env[self.jaxpr.eqns[i].outvars[0]] = value
            if depends:
                inner.depends[self.jaxpr.eqns[i].outvars[0]] = depends
            return self.run(i + 1, inner)

        return jnp.sum(probs * jax.vmap(rest, axis_name=axis)(tried, probs))

    def _scan(self, i: int, eqn: Any, values: list[Any], inputs: list[Dependence], state: State) -> Any:
        """Run a scan with sites; its scores get a leading time axis, and step t owes to the steps up to t."""
        num_consts, num_carry = _jax.scan_sizes(eqn)
        body, length, reverse = eqn.params["jaxpr"], eqn.params["length"], eqn.params["reverse"]
        consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]
        names: list[tuple[str, Reinforce | None]] = []

        noise, handed = noise_of_steps(body, self.sources[i], length)

        def step(carry: Any, inputs: Any) -> Any:
            own_noise, x = inputs
            outputs, found = _direct(body, [*consts, *carry, *x], handed(own_noise))
            names[:] = [(site.address, strategy) for site, strategy, _, _ in found]
            return outputs[:num_carry], (outputs[num_carry:], [f[2] for f in found], [f[3] for f in found])

        carry, (ys, scores, finite) = lax.scan(
            step, carry, (noise, xs), length=length, reverse=reverse, unroll=eqn.params["unroll"]
        )
        own: dict[int, Any] = {}
        for n, ((address, strategy), score, ok) in enumerate(zip(names, scores, finite, strict=True)):
            if self.checks is not None:
                self.checks.append(Check(address, jnp.all(ok)))
            if strategy is not None:
                number = i + len(self.jaxpr.eqns) * (n + 1)  # a name of its own for each site of the body
                state.scores[number] = Score(score, "reverse" if reverse else "forward", strategy)
                own[number] = jnp.ndim(score)
        outer: Dependence = {}
        for dependence in inputs:
            outer = merge(outer, mixed(dependence))
        to_carry = outer | {number: (None,) * ndim for number, ndim in own.items()}
        to_ys = outer | {number: (0, *(None,) * (ndim - 1)) for number, ndim in own.items()}
        return [*carry, *ys], [to_carry] * num_carry + [to_ys] * len(ys)


@dataclasses.dataclass(frozen=True)
class _Branch:
    """The name of the vmap axis of an enumeration."""

    equation: int


def _like(flags: Any, values: Any) -> Any:
    return flags.reshape(flags.shape + (1,) * (values.ndim - 1))


def masked_site(eqn: Any, operands: list[Any]) -> tuple[Site, list[Any], Any]:
    """Return a site, its distribution's leaves, and its mask or None."""
    site, leaves, extras = eqn.params["site"].split(operands)
    return site, leaves, extras.get("mask")


def element_scores(site: Site, value: Any, leaves: Any, mask: Any) -> Any:
    """Return the log density of each independent element, shape `lanes + batch`; 0 where a branch is not taken."""
    scores = site.log_density(value, leaves)
    return scores if mask is None else jnp.where(mask, scores, 0.0)


def _at_site(i: int, site: Site, leaves: Any, inputs: list[Dependence], scored: bool = True) -> Dependence:
    """A draw depends on what its parameters depend on (lane by lane), and on its own score element by element."""
    result: Dependence = {}
    for j, (leaf, dependence) in enumerate(zip(leaves, inputs, strict=True)):
        result = merge(result, moved(dependence, lane_mover(site.lanes, j, jnp.ndim(leaf))))
    if scored and isinstance(site.gradient, Reinforce):
        lanes = len(site.lanes)
        batch = len(site.distribution(leaves).batch_shape)
        result = result | {i: tuple(range(lanes + batch))}
    return result


def noise_of_steps(body: Any, key: Any, length: int) -> tuple[Any, Callable[[Any], Iterator[Any]]]:
    """Draw the noise of a scan's steps ahead of it; the function makes a step's sources of its part."""
    plan = planned(_jax.close(body)[0].eqns)
    noise, of_step = drawn_for_steps(plan, key, length)
    return noise, lambda own: itertools.chain(*handed_out(plan, of_step(own)))


def _direct(
    body: Any, args: Any, found_sources: Iterator[Any]
) -> tuple[list[Any], list[tuple[Site, Reinforce | None, Any, Any]]]:
    """Run a scan's body with sites drawn; return also `(site, strategy, score, finite)` of each."""
    env = _jax.Environment.of(body, args)
    opened = _jax.close(body)[0]
    found: list[tuple[Site, Reinforce | None, Any, Any]] = []
    for eqn in opened.eqns:
        values = [env.read(v) for v in eqn.invars]
        if eqn.primitive is sample_p:
            site, values, mask = masked_site(eqn, values)
            value = draw_site(site, values, next(found_sources))
            strategy = site.gradient if isinstance(site.gradient, Reinforce) else None
            score = 0.0
            if strategy is not None:
                value = sg(value)
                score = element_scores(site, value, values, mask)
            found.append((site, strategy, score, jnp.all(jnp.isfinite(value))))
            outputs = [value]
        elif _jax.holds(eqn, sample_p):
            outputs, inner = _inner_scan(eqn, values, next(found_sources))
            found.extend(inner)
        else:
            outputs = _jax.bind(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [env.read(v) for v in opened.outvars], found


def _inner_scan(eqn: Any, values: list[Any], key: Any) -> tuple[list[Any], list[Any]]:
    """A scan in a scan: its sites' scores are summed over its steps."""
    num_consts, num_carry = _jax.scan_sizes(eqn)
    consts, carry, xs = values[:num_consts], values[num_consts:][:num_carry], values[num_consts + num_carry :]
    sites: list[Any] = []
    length = eqn.params["length"]
    noise, handed = noise_of_steps(eqn.params["jaxpr"], key, length)

    def step(carry: Any, inputs: Any) -> Any:
        own_noise, x = inputs
        outputs, found = _direct(eqn.params["jaxpr"], [*consts, *carry, *x], handed(own_noise))
        sites[:] = [(site, strategy) for site, strategy, _, _ in found]
        return outputs[:num_carry], (outputs[num_carry:], [f[2] for f in found], [f[3] for f in found])

    carry, (ys, scores, finite) = lax.scan(step, carry, (noise, xs), length=length, reverse=eqn.params["reverse"])
    joined = [
        (site, strategy, jnp.sum(score), jnp.all(ok))
        for (site, strategy), score, ok in zip(sites, scores, finite, strict=True)
    ]
    return [*carry, *ys], joined
