"""Objectives: scalar programs with random choices, and their estimators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from expectax.ppl import AddressError, Posterior, Program, ShapeError, StrategyError, SupportError, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._errors import nearest
from expectax.ppl._staging import as_data, check_key
from expectax.ppl._support import relaxed

from ._boxes import Samples
from ._flat import Strategies, planned
from ._layout import Layout
from ._soundness import check_soundness
from ._strategy import biased
from ._surrogate import Check, surrogate


@functools.partial(jax.tree_util.register_dataclass, data_fields=["captured"], meta_fields=["function", "allow"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Objective:
    r"""A scalar program $f(\theta)$ whose expectation over its random choices is to be maximised.

    Made by `vi.objective`, or by a shipped objective such as `vi.elbo`. Example: see `vi.objective`.

    Attributes:
        function: called as `function(*captured, params)`.
        captured: data that the objective carries (posteriors, guides), so that new data costs no compilation.
        allow: paths of sites whose gradients may be biased, see `allowing`.
    """

    function: Callable[..., Any]
    captured: tuple[Any, ...] = ()
    allow: frozenset[str] = frozenset()

    def allowing(self, *addresses: str) -> Objective:
        """Return the objective with biased or unchecked gradients allowed at some sites.

        Args:
            addresses: paths of sites with a biased strategy, or that the soundness check refuses.

        Raises:
            AddressError: at first use, if the objective has no such site (the nearest is named).

        Example:
            >>> import expectax as ex
            >>> from expectax import dist, vi
            >>> @vi.objective
            ... def flip(p):
            ...     return ex.sample("b", dist.Bernoulli(p), gradient=vi.StraightThrough()) * 2.0
            >>> sorted(flip.allowing("b").allow)
            ['b']
        """
        return dataclasses.replace(self, allow=self.allow | frozenset(addresses))

    def __call__(self, params: Any) -> Any:
        """Run the objective inside another one: its choices become choices of the outer objective."""
        return self.function(*self.captured, params)

    def surrogate(self, params: Any, key: PRNGKeyArray, num_samples: int = 1) -> Float[Array, ""]:
        r"""Return a differentiable unbiased estimate, averaged over independent samples.

        Args:
            params: a pytree.
            key: a typed key.
            num_samples: how many independent samples to average.

        Returns:
            A scalar $\hat f$ with $E[\hat f] = E[f]$ and $E[\nabla^n \hat f] = \nabla^n E[f]$ for every order $n$.

        Raises:
            ShapeError: the objective does not return a scalar.
            StrategyError: a site's gradient strategy does not fit it.

        Example:
            >>> import jax, jax.numpy as jnp, expectax as ex
            >>> from expectax import dist, vi
            >>> @vi.objective
            ... def square(p):
            ...     return ex.sample("b", dist.Bernoulli(p)) * 2.0
            >>> float(jax.grad(square.surrogate)(0.25, jax.random.key(0)))
            2.0
        """
        check_key(key)
        return self.staged(params).mean(key, num_samples)

    def staged(self, params: Any, strategies: Strategies | None = None) -> Staged:
        """Trace the objective at some parameters, for the estimator; `strategies` replace those of sites, by path."""
        dynamic, static = eqx.partition((self.captured, as_data(params)), eqx.is_array)
        leaves, structure = jax.tree.flatten(dynamic)

        def run(*leaves: Any) -> Any:
            captured, params = eqx.combine(jax.tree.unflatten(structure, leaves), static)
            value = self.function(*captured, params)
            if value is None:
                raise TypeError(f"{self!r} returned None: it lacks a return.")
            if jnp.shape(value) != ():
                raise ShapeError(f"{self!r} must return a scalar, but returned shape {jnp.shape(value)}.")
            if jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
                raise TypeError(f"{self!r} must return a real number, but returned a complex one. Take its real part.")
            return jnp.asarray(value, jnp.result_type(float))

        token = relaxed.set([])
        try:
            flat, layout = planned(jax.make_jaxpr(run)(*leaves), leaves, strategies)
            complaints = relaxed.get()
        finally:
            relaxed.reset(token)
        if complaints and not any(getattr(choice.strategy, "relaxed", False) for choice in layout.choices):
            raise SupportError(complaints[0])
        check_allowed(layout, self.allow)
        check_soundness(flat, self.allow, len(jax.tree.leaves(eqx.filter(self.captured, eqx.is_array))))
        return Staged(layout, flat.consts, leaves)

    def __repr__(self) -> str:
        """Show the objective by its name and place."""
        code = getattr(self.function, "__code__", None)
        place = f" at {code.co_filename}:{code.co_firstlineno}" if code else ""
        return f"<objective {getattr(self.function, '__name__', '?')}{place}>"


class Staged(NamedTuple):
    """An objective at some parameters: its flat jaxpr's layout, the jaxpr's constants and arguments."""

    layout: Layout
    consts: Any
    args: list[Any]

    def surrogate(
        self,
        key: Any,
        samples: Samples | None = None,
        checks: list[Check] | None = None,
        stopped: frozenset[str] = frozenset(),
    ) -> Any:
        """Run the estimator once."""
        return surrogate(self.layout, self.consts, self.args, key, samples, checks, stopped)

    def mean(self, key: Any, num_samples: int, stopped: frozenset[str] = frozenset()) -> Any:
        """Average the estimator over independent samples."""
        if num_samples < 1:
            raise ValueError(f"num_samples is at least 1, got {num_samples}.")
        if num_samples == 1:
            return self.surrogate(key, stopped=stopped)

        def one(name: Any, key: Any) -> Any:
            return self.surrogate(key, Samples(name, num_samples), stopped=stopped)

        return jnp.mean(_jax.over_lanes(one, num_samples, mean_axis=True)(key))


def objective(function: Callable[[Any], Any] | None = None, *, allow: Collection[str] = ()) -> Any:
    """Turn a scalar function of the parameters, with random choices, into an objective to maximise.

    Args:
        function: called with the parameters; inside, `vi.simulate(guide(params))`, `vi.log_density(posterior, z)`,
            `expectax.sample`, `jax.vmap` over particles and any JAX code. It returns a scalar.
        allow: paths of sites whose gradients may be biased, as in `@vi.objective(allow={"b"})`; see
            `Objective.allowing`.

    Returns:
        An `Objective`.

    Source: the objective language of Becker et al., PLDI 2024.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def quadratic(mean):
        ...     return -ex.sample("x", dist.Normal(mean, 1.0)) ** 2
        >>> value, gradient = vi.value_and_grad(quadratic)(1.0, jax.random.key(0), num_samples=8)
        >>> gradient.shape
        ()
    """
    if function is None:
        return lambda function: objective(function, allow=allow)
    if isinstance(allow, str):
        raise TypeError(f'objective: allow is a set of addresses, such as {{"{allow}"}}, not a string.')
    return Objective(function, allow=frozenset(allow))


def check_allowed(layout: Layout, allow: frozenset[str]) -> None:
    """Refuse biased strategies that are not allowed by name, and names that are no site."""
    known = {choice.site.address for choice in layout.choices}
    for address in sorted(allow - known):
        raise AddressError(f"allow: the objective has no site {address!r}.{nearest(address, known)}")
    for choice in layout.choices:
        if biased(choice.strategy) and choice.site.address not in allow:
            raise StrategyError(
                f"{choice.place}: gradients by {choice.strategy!r} are biased. If that is wanted, allow it by name: "
                f"objective.allowing({choice.site.address!r})."
            )


def simulate(program: Program) -> tuple[Any, Float[Array, ""]]:
    r"""Run a guide inside an objective.

    Args:
        program: a bound model, such as `guide(params)`.

    Returns:
        `(choices, log_density)`: the nested dict of choices and $\log q(z)$. The choices are the objective's own: its
        estimator draws them and differentiates through them.

    Raises:
        TypeError: `program` is not a bound model.

    Example: see `vi.objective`.
    """
    if not isinstance(program, Program):
        raise TypeError(f"vi.simulate takes a bound model such as guide(params), got {type(program).__name__}.")
    outcome = program.rebind()
    return outcome.choices, outcome.log_density


def log_density(target: Program | Posterior, choices: Any) -> Float[Array, ""]:
    r"""Score choices inside an objective (or anywhere else).

    Args:
        target: a posterior, for $\log p(z, y)$ at the latents, or a bound model, for $\log p$ at all its choices.
        choices: nested dict of values.

    Returns:
        A scalar; minus infinity outside the support.

    Raises:
        AddressError, ShapeError, SupportError: the choices do not fit the target.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def normal():
        ...     ex.sample("x", dist.Normal(0.0, 1.0))
        >>> round(float(vi.log_density(normal(), {"x": 0.0})), 4)
        -0.9189
    """
    if isinstance(target, Posterior):
        return target.log_density_inside(choices)
    return target.assess_inside(choices)[0]


def _loss(differentiable: Any, rest: Any, objective: Objective, key: Any, num_samples: int) -> Any:
    return objective.surrogate(eqx.combine(differentiable, rest), key, num_samples)


def gradient_step(objective: Objective, params: Any, key: Any, num_samples: int) -> tuple[Any, Any]:
    """Return `(value, gradient)`; the gradient has None where a parameter is not a float."""
    differentiable, rest = eqx.partition(params, eqx.is_inexact_array)
    return jax.value_and_grad(_loss)(differentiable, rest, objective, key, num_samples)


def value_and_grad(objective: Objective) -> Callable[..., tuple[Float[Array, ""], Any]]:
    r"""Return `estimator(params, key, num_samples=1) -> (value, gradient)`, compiled once.

    Both are unbiased, for $E[f(\theta)]$ and $\nabla_\theta E[f(\theta)]$; the gradient has the structure of `params`,
    with None in place of what is not a float. The average over samples is taken before the derivative.

    Example: see `vi.objective`.
    """

    def estimator(params: Any, key: PRNGKeyArray, num_samples: int = 1) -> tuple[Float[Array, ""], Any]:
        return _compiled_step(objective, as_data(params), key, num_samples)

    return estimator


_compiled_step = compiled(gradient_step)


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error.

    Example: see `vi.estimate`.
    """

    mean: Float[Array, ""]
    standard_error: Float[Array, ""]


def estimate(objective: Objective, params: Any, key: PRNGKeyArray, num_samples: int = 1000) -> Estimate:
    """Estimate an objective's expectation at fixed parameters, with its standard error.

    Args:
        objective: the objective.
        params: its parameters.
        key: a typed key.
        num_samples: number of independent samples, at least 2.

    Returns:
        An `Estimate`.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @vi.objective
        ... def mean(m):
        ...     return ex.sample("x", dist.Normal(m, 1.0))
        >>> float(vi.estimate(mean, 3.0, jax.random.key(0), 4096).standard_error) < 0.02
        True
    """
    if num_samples < 2:
        raise ValueError(f"estimate needs num_samples >= 2 for a standard error, got {num_samples}.")
    values = _compiled_samples(objective, as_data(params), key, num_samples)
    return Estimate(jnp.mean(values), jnp.std(values, ddof=1) / jnp.sqrt(num_samples))


def _samples(objective: Objective, params: Any, key: Any, num_samples: int) -> Any:
    check_key(key)
    staged = objective.staged(params)
    return _jax.over_lanes(lambda k: staged.surrogate(k), num_samples)(key)


_compiled_samples = compiled(_samples)


def log_weights_of(objective: Objective, params: Any, key: Any, num_samples: int) -> Array:
    """Return independent values of an objective; of an ELBO they are log importance weights."""
    return _compiled_samples(objective, as_data(params), key, num_samples)


def first_nonfinite(objective: Objective, params: Any, key: PRNGKeyArray, num_samples: int = 1) -> str | None:
    """Return the address of the first site with a value, parameter or log density that is not finite, or None."""
    addresses: list[str] = []
    flags = _checks(objective, as_data(params), key, num_samples, addresses.extend)
    return next((a for a, ok in zip(addresses, jax.device_get(flags), strict=True) if not ok.all()), None)


def _checks(objective: Objective, params: Any, key: Any, num_samples: int, names: Callable[[Any], None]) -> Any:
    staged = objective.staged(params)

    def one(key: Any) -> Any:
        checks: list[Check] = []
        staged.surrogate(key, checks=checks)
        names([c.address for c in checks])
        return [c.finite for c in checks]

    return one(key) if num_samples == 1 else _jax.over_lanes(one, num_samples)(key)
