"""Semi-amortised inference: an encoder's guess, refined by a few gradient steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import sample

from ._bounds import elbo
from ._objective import Objective
from ._shared import Guide, Target, check_target, target_at
from ._strategy import Reinforce


def semi_amortised(
    posterior: Target,
    guide: Guide,
    encoder: Callable[[Any], Any],
    optimizer: optax.GradientTransformation,
    num_steps: int,
) -> Objective:
    r"""The ELBO of a guide whose parameters are an encoder's guess, refined by gradient steps on the ELBO itself.

    $\lambda_0 = \text{encoder}(\phi)$, $\lambda_{k+1} = \lambda_k + \text{update}(\nabla_\lambda ELBO(\lambda_k))$, and the
    value is $ELBO(\lambda_K)$. The derivative goes through the steps (it costs second derivatives of the densities), so
    that the encoder learns to make guesses that are quickly mended. Each step has fresh noise of its own; value and
    gradient are unbiased for the expectation over the noise of the steps too, a lower bound of the evidence. Several
    data are refined at once, each by its own row of $\lambda$ (plain `optax.sgd` keeps them apart).

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the local parameters $\lambda$, with exactly the posterior's latents as sites.
        encoder: a function of the parameters that returns $\lambda_0$, a pytree of floats.
        optimizer: an `optax` optimiser for the steps, such as `optax.sgd(0.1)`.
        num_steps: $K$, at least 0; with 0 it is the amortised ELBO.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_steps` is negative.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Kim et al. 2018, Semi-amortized variational autoencoders.

    Example:
        >>> import jax, jax.numpy as jnp, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> y = jnp.array([1.0, -2.0])
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(jnp.zeros(2), 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(mean):
        ...     ex.sample("z", dist.Normal(mean, 0.5**0.5))
        >>> bound = vi.semi_amortised(model().given({"y": y}), guide, lambda p: p * y, optax.sgd(0.1), num_steps=5)
        >>> plain = vi.elbo(model().given({"y": y}), lambda p: guide(p * y))
        >>> key = jax.random.key(0)
        >>> bool(vi.estimate(bound, 0.0, key).mean > vi.estimate(plain, 0.0, key).mean)
        True
    """
    check_target(posterior)
    if num_steps < 0:
        raise ValueError(f"semi_amortised needs num_steps >= 0, got {num_steps}.")
    return Objective(_semi_amortised, (posterior, guide, encoder, optimizer, num_steps))


def _semi_amortised(
    posterior: Target, guide: Guide, encoder: Callable[[Any], Any], optimizer: Any, num_steps: int, params: Any
) -> Any:
    local = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), encoder(params))
    bound = elbo(target_at(posterior, params), guide)

    def step(carry: Any, key: Any) -> Any:
        local, state = carry
        descent = jax.grad(lambda x: -bound.surrogate(x, key))(local)
        updates, state = optimizer.update(descent, state, local)
        return (optax.apply_updates(local, updates), state), None

    if num_steps:
        keys = jax.random.split(_fresh_key(), num_steps)
        (local, _), _ = lax.scan(step, (local, optimizer.init(local)), keys)
    return bound(local)


def _fresh_key() -> Any:
    """Return a key that is a random choice of the objective: the bits of two normal draws."""
    seed = sample("seed", dist.Normal(jnp.zeros(2, jnp.float32), jnp.float32(1.0)), gradient=Reinforce(baseline=None))
    return jax.random.wrap_key_data(lax.bitcast_convert_type(seed.astype(jnp.float32), jnp.uint32), impl="threefry2x32")
