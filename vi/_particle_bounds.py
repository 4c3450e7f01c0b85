"""A bound on the evidence of a time series, from a particle filter that is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import Program, ShapeError, _jax, sample
from expectax.ppl._match import check_guide
from expectax.ppl._nested import Choices, merged

from ._objective import Objective, simulate
from ._relaxed import NoGradient
from ._shared import check_particles, log_mean_exp

ModelStep = Callable[[Any, Any], Program]
GuideStep = Callable[[Any, Any, Choices], Program]


def fivo(
    model_step: ModelStep,
    guide_step: GuideStep,
    observations: Choices,
    initial: Any,
    num_particles: int,
    *,
    resampling_gradients: bool,
) -> Objective:
    r"""The filtering bound $E[\log \hat p(y_{1:T})] \le \log p(y_{1:T})$, $\hat p = \prod_t \frac1n \sum_i w_t^i$.

    A particle filter draws each step's latents from a guide, weighs them by $w_t = p(x_t, y_t \mid s_{t-1}) /
    q_\phi(x_t \mid s_{t-1}, y_t)$, and resamples all particles (multinomial) before the next step. Its $\hat p$ is an
    unbiased estimate of the evidence, for any $n$, and the bound is tighter than `vi.iwelbo`'s in long series. Guide and
    model are learned together. One particle makes it the ELBO. Also known as AESMC and VSMC.

    Args:
        model_step: a model of `(params, state)`: one step of time. Its sites are that step's latents and observations,
            and it returns the next state.
        guide_step: a model of `(params, state, observation)`, with exactly the step's latents as sites.
        observations: nested dict of the observed values, time first: arrays of shape `(T, ...)`.
        initial: the state before the first step: arrays or numbers, of the shapes that `model_step` returns. A first
            step that differs from the others needs a state that tells it, such as the time.
        num_particles: $n$, at least 1.
        resampling_gradients: has no default, as either choice has its price. With True the gradient has the
            score-function terms of the ancestors: unbiased and noisy (take `num_samples > 1` for the leave-one-out
            baseline). With False, as the authors recommend, the choice of ancestors is held still: *biased* for the
            bound's gradient, with far less variance. The value is the same.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 1.
        ShapeError: the observations are not of one length, or the next state is not like the initial one.
        AddressError, SupportError: at first use, if the guide does not fit the model.

    Source: Maddison et al. 2017 (FIVO); Le et al. 2018 (AESMC); Naesseth et al. 2018 (VSMC).

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def step(params, state):
        ...     x = ex.sample("x", dist.Normal(params["decay"] * state, 1.0))
        ...     ex.sample("y", dist.Normal(x, 0.5))
        ...     return x
        >>> @ex.model
        ... def proposal(params, state, observation):
        ...     mean = params["decay"] * state
        ...     ex.sample("x", dist.Normal(mean + params["gain"] * (observation["y"] - mean), 0.5))
        >>> data = {"y": jnp.array([0.5, 1.2, 0.3])}
        >>> bound = vi.fivo(step, proposal, data, 0.0, num_particles=16, resampling_gradients=False)
        >>> value, gradient = vi.value_and_grad(bound)({"decay": 0.9, "gain": 0.8}, jax.random.key(0))
        >>> sorted(gradient)
        ['decay', 'gain']
    """
    check_particles("fivo", num_particles)
    observations, initial = jax.tree.map(jnp.asarray, (observations, initial))
    lengths = {y.shape[:1] for y in jax.tree.leaves(observations)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        raise ShapeError(f"fivo needs observations with one time axis in front, got lengths {sorted(lengths)}.")
    captured = (model_step, guide_step, observations, initial, num_particles, resampling_gradients)
    return Objective(_fivo, captured, allow=frozenset() if resampling_gradients else frozenset({"ancestor"}))


def _fivo(
    model_step: ModelStep,
    guide_step: GuideStep,
    observations: Choices,
    initial: Any,
    num_particles: int,
    resampling_gradients: bool,
    params: Any,
) -> Any:
    first = jax.tree.map(lambda y: y[0], observations)
    check_guide(guide_step(params, initial, first), model_step(params, initial).given(first), _jax.caller())

    def particle(state: Any, y: Choices) -> Any:
        x, log_q = simulate(guide_step(params, state, y))
        log_p, following = model_step(params, state).assess_inside(merged(x, y))
        return log_p - log_q, _like(following, initial)

    def step(cloud: Any, y: Choices) -> Any:
        log_w, states = cloud
        ancestors = _ancestors(log_w, resampling_gradients)
        log_w, states = jax.vmap(particle, (0, None))(jax.tree.map(lambda s: s[ancestors], states), y)
        return (log_w, states), log_mean_exp(log_w)

    start = jax.tree.map(lambda s: jnp.broadcast_to(s, (num_particles, *s.shape)), initial)
    log_w, states = jax.vmap(particle, (0, None))(start, first)
    rest = jax.tree.map(lambda y: y[1:], observations)
    return log_mean_exp(log_w) + jnp.sum(lax.scan(step, (log_w, states), rest)[1])


def _ancestors(log_w: Any, gradients: bool) -> Any:
    """Choose the particles that go on: a plain site, whose score is the gradient of resampling."""
    strategy = None if gradients else NoGradient()
    logits = log_w if gradients else lax.stop_gradient(log_w)
    one = lambda _: sample("ancestor", dist.Categorical(logits=logits), gradient=strategy)  # noqa: E731
    return jax.vmap(one)(jnp.arange(log_w.size))


def _like(state: Any, initial: Any) -> Any:
    """Return the next state as arrays; refuse one that is not like the first."""
    state = jax.tree.map(jnp.asarray, state)
    shapes = [jax.tree.map(lambda s: (s.shape, s.dtype.name), tree) for tree in (state, initial)]
    if shapes[0] != shapes[1]:
        raise ShapeError(f"fivo: model_step returned a state of {shapes[0]}, but the initial one is of {shapes[1]}.")
    return state
