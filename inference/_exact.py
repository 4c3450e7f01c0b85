r"""All runs of a keyless program whose choices are finite, with their probabilities: its exact law.

Where an algorithm's own choices (draws of latents, ancestors, acceptances) have finite supports, its law is a finite sum.
What is unbiased, or invariant, then is so to rounding, and a test of it has no false alarms: the method of monad-bayes'
enumerator (Scibior et al. 2018, "Denotational validation of higher-order Bayesian inference"), with loops, lanes and
branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from expectax.ppl import ControlFlowError, _jax
from expectax.ppl._branch import branches_of, clamped, guarded, select
from expectax.ppl._finite import single_support
from expectax.ppl._keyless import opened
from expectax.ppl._masked import expand
from expectax.ppl._observe import deterministic_p
from expectax.ppl._sample import sample_p, with_mask
from expectax.ppl._stochastic import stochastic_p
from expectax.ppl._table import has_sites, unfollowable

_MOST_RUNS = 2**24
_TOGETHER = 2**13
"""How many runs are computed at once."""


class Measure(eqx.Module):
    r"""The exact law of a keyless program: $\sum_r p_r \delta_{x_r}$ over its runs.

    Example: see `exact`.

    Attributes:
        probabilities: $p_r$, shape `(runs,)`; they sum to 1.
        values: what each run returned, runs first.
    """

    probabilities: Float[Array, " runs"]
    values: Any

    def expectation(self, function: Callable[[Any], Any] = lambda value: value) -> Any:
        r"""Return $\sum_r p_r f(x_r)$, a pytree; a run of probability 0 counts nothing, whatever it returned."""

        def mean(v: Any) -> Any:
            possible = expand(self.probabilities > 0, v)
            return jnp.tensordot(self.probabilities, jnp.where(possible, v, 0), axes=1)

        arrays, rest = eqx.partition(self.values, eqx.is_array)
        return jax.tree.map(mean, jax.vmap(lambda own: function(eqx.combine(own, rest)))(arrays))


def exact(function: Callable[..., Any], *args: Any) -> Measure:
    r"""Enumerate all runs of a keyless program.

    Every choice must have a finite support: `Bernoulli`, `Categorical`, the ancestors of a resampling step. Their number
    is the product of the supports' sizes over all choices made, loops written out and branches that are not taken
    included, at most `2**24`.

    Args:
        function: a keyless program, such as an algorithm of `inference` or a kernel's step.
        *args: its arguments.

    Returns:
        A `Measure`. Its errors are those of rounding: use `jax_enable_x64` for `1e-10`.

    Raises:
        ControlFlowError: a choice has no finite support, is observed, or the runs are too many.

    Source: Scibior et al. 2018.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist, inference
        >>> def heads():
        ...     first = ex.sample("coin", dist.Bernoulli(0.5))
        ...     return first + ex.sample("coin", dist.Bernoulli(0.25 + 0.5 * first))
        >>> law = inference.exact(heads)
        >>> law.probabilities.shape, float(law.expectation())
        ((4,), 1.0)
    """
    jaxpr, leaves, rebuilt = opened(function, *args)
    supports: list[np.ndarray] = []

    def listed(site: Any, leaves: Any, extras: Any) -> Any:
        supports.extend([_support_of(site, leaves)] * math.prod(site.element_shape))
        value = np.broadcast_to(supports[-1][0] if supports else 0, site.value_shape)
        return jnp.asarray(value, site.dtype), jnp.zeros(())

    jax.eval_shape(lambda *leaves: _run(jaxpr, list(leaves), listed), *leaves)
    sizes = [len(values) for values in supports]
    count = math.prod(sizes)
    if count > _MOST_RUNS:
        raise ControlFlowError(
            f"inference.exact: the program has {count} runs, more than {_MOST_RUNS}. Use fewer particles, steps or values."
        )
    log_probabilities, outputs = _all_runs(jaxpr, leaves, sizes)
    return Measure(jnp.exp(log_probabilities), rebuilt(outputs))


def _all_runs(jaxpr: Any, leaves: list[Any], sizes: list[int]) -> tuple[Any, list[Any]]:
    """Run the program once for every combination of choices."""
    strides = np.cumprod([1, *sizes[::-1]])[::-1][1:]

    def one(number: Any) -> Any:
        digits = iter([(number // stride) % size for stride, size in zip(strides, sizes, strict=True)])

        def chosen(site: Any, leaves: Any, extras: Any) -> Any:
            support = jnp.asarray(_support_of(site, leaves))
            count = math.prod(site.element_shape)
            own = jnp.stack([next(digits) for _ in range(count)]) if count else jnp.zeros(0, int)
            value = support[own].reshape(site.value_shape).astype(site.dtype)
            terms = site.log_density(value, leaves)
            if "mask" in extras:  # of what is not made, one value stands for all
                first = jnp.reshape(own == 0, site.element_shape)
                terms = jnp.where(extras["mask"], terms, jnp.where(first, 0.0, -jnp.inf))
            return value, jnp.sum(terms)

        return _run(jaxpr, leaves, chosen)

    numbers = jnp.arange(math.prod(sizes))
    return jax.jit(lambda: lax.map(one, numbers, batch_size=_TOGETHER))()


def _support_of(site: Any, leaves: Any) -> np.ndarray:
    """Return the values of one element of a site, of which it must have finitely many."""
    values = single_support(site, leaves)
    if values is None:
        raise ControlFlowError(
            f"inference.exact: {site.address!r} at {site.where} has no finite, known support, so that its values cannot be "
            "enumerated. Use a model with finite choices; for a kernel that draws numbers see inference.check_kernel."
        )
    return values


def _run(jaxpr: Any, args: list[Any], choose: Any, mask: Any = None) -> tuple[Any, list[Any]]:
    """Run equations with `choose(site, leaves, extras) -> (value, log probability)` at each site."""
    env, body = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
    total = jnp.zeros(())
    for eqn in body.eqns:
        log_probability, outputs = _equation(eqn, [env.read(v) for v in eqn.invars], choose, mask)
        env.update(zip(eqn.outvars, outputs, strict=True))
        total = total + log_probability
    return total, [env.read(v) for v in body.outvars]


def _equation(eqn: Any, values: list[Any], choose: Any, mask: Any) -> tuple[Any, list[Any]]:
    if eqn.primitive is sample_p:
        value, log_probability = _site(eqn.params["site"], values, choose, mask)
        return log_probability, [value]
    if eqn.primitive is deterministic_p:
        return 0.0, values
    if not has_sites(eqn):
        return 0.0, _jax.bind(eqn, values)
    inner = _jax.called_jaxpr(eqn)
    inner = _jax.custom_jaxpr(eqn) if inner is None else inner
    if inner is not None:
        return _run(inner, values, choose, mask)
    if eqn.primitive in _jax.SCAN:
        return _steps(eqn, values, choose, mask)
    if (branches := branches_of(eqn)) is not None:
        return _branches(branches, values, choose, mask)
    if eqn.primitive is stochastic_p:
        density = eqn.params["density"]
        total, outputs = _run(density.draw, values[: density.cut], choose, mask)
        return total, outputs[1:]
    raise unfollowable(eqn)


def _site(site: Any, operands: list[Any], choose: Any, mask: Any) -> tuple[Any, Any]:
    if site.fixed:
        raise ControlFlowError(
            f"inference.exact: {site.address!r} at {site.where} is observed in a keyless program, whose law has no place for "
            "its density. Observe it in a model, and weigh with a target's log_density."
        )
    if mask is not None:
        site, operands = with_mask(site, operands, mask)
    return choose(*site.split(operands))


def _steps(eqn: Any, values: list[Any], choose: Any, mask: Any) -> tuple[Any, list[Any]]:
    """Write out a loop."""
    num_consts, num_carry = _jax.scan_sizes(eqn)
    cut, length, body = num_consts + num_carry, eqn.params["length"], eqn.params["jaxpr"]
    consts, carry, xs = values[:num_consts], values[num_consts:cut], values[cut:]
    order = range(length)[:: -1 if eqn.params["reverse"] else 1]
    total, stacked = jnp.zeros(()), {}
    for t in order:
        log_probability, outputs = _run(body, [*consts, *carry, *(x[t] for x in xs)], choose, mask)
        carry, stacked[t] = outputs[:num_carry], outputs[num_carry:]
        total = total + log_probability
    types = [v.aval for v in eqn.outvars[num_carry:]]
    columns = [
        jnp.stack([stacked[t][n] for t in range(length)]) if length else jnp.zeros(a.shape, a.dtype)
        for n, a in enumerate(types)
    ]
    return total, [*carry, *columns]


def _branches(branches: Any, values: list[Any], choose: Any, mask: Any) -> tuple[Any, list[Any]]:
    """Run all branches, their choices masked where the branch is not taken."""
    index, operands = clamped(values[0], len(branches)), values[1:]
    total, results = jnp.zeros(()), []
    for number, branch in enumerate(branches):
        taken = index == number
        if mask is not None:
            taken = taken & jnp.reshape(mask, jnp.shape(mask) + (1,) * (jnp.ndim(taken) - jnp.ndim(mask)))
        log_probability, outputs = _run(branch, guarded(taken, operands), choose, taken)
        total, results = total + log_probability, [*results, outputs]
    return total, [select(index, list(cases)) for cases in zip(*results, strict=True)]


def tolerance_or_default(tolerance: float | None) -> float:
    """Return the tolerance given, or what rounding leaves of an exact sum."""
    return tolerance if tolerance is not None else (1e-10 if jnp.result_type(float) == jnp.float64 else 1e-5)
