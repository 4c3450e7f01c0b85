r"""Langevin and Hamiltonian dynamics with gradients of minibatches: approximate, for large data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import Posterior, ShapeError
from expectax.ppl._keyless import random_key
from expectax.ppl._nested import Choices

from ._kernel import Adaptation, Info, State
from ._target import Flat, Target

Minibatch = Callable[[Any], Posterior]


class StochasticGradient(eqx.Module):
    """A kernel that follows noisy gradients and never rejects; made by `sgld` or `sghmc`. Example: see `sgld`."""

    name: Literal["sgld", "sghmc"] = eqx.field(static=True)
    minibatch: Minibatch = eqx.field(static=True)
    step_size: float | Callable[[Any], Any] = eqx.field(static=True)
    num_integration_steps: int = eqx.field(static=True, default=1)
    friction: float = eqx.field(static=True, default=0.0)
    extended: bool = eqx.field(static=True, default=True)

    def init(self, target: Target, latents: Choices) -> State:
        """Return the unconstrained position, and the number of steps that were made in the cache."""
        flat = target.flat()
        position = flat.unconstrain(latents)
        return State(position, flat.log_density(position), jnp.zeros((), jnp.int32))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move along the gradient of one minibatch."""
        del parameters
        flat = self._of_minibatch(target)
        size = self.step_size(state.cache) if callable(self.step_size) else self.step_size
        size = jnp.asarray(size, state.position.dtype)
        move = self._langevin if self.name == "sgld" else self._hamiltonian
        position = move(jax.grad(flat.log_density), state.position, size)
        after = State(position, flat.log_density(position), state.cache + 1)
        diverged = ~jnp.all(jnp.isfinite(position))
        return after, Info(jnp.ones(()), diverged, self.num_integration_steps, -after.log_density)

    def _of_minibatch(self, target: Target) -> Flat:
        flat = Target(self.minibatch(random_key("minibatch"))).flat()
        if flat.size != target.flat().size:
            raise ShapeError(
                f"{self.name}: the minibatch's posterior has {flat.size} unconstrained numbers, the posterior {target.flat().size}. "
                "Both must have the same latents; draw only data in minibatches."
            )
        return flat

    def _langevin(self, gradient: Any, position: Any, size: Any) -> Any:
        import blackjax  # here, because importing it starts JAX's backend

        return blackjax.sgld.build_kernel()(random_key("noise"), position, lambda x, _: gradient(x), None, size)

    def _hamiltonian(self, gradient: Any, position: Any, size: Any) -> Any:
        """Move by BlackJAX's integrator, with keys of our own: its kernel draws momentum and noise from one key."""
        from blackjax.sgmcmc.diffusions import sghmc

        one_step = sghmc(self.friction)
        key_momentum, key_noise = jax.random.split(random_key("noise"))
        momentum = jax.random.normal(key_momentum, position.shape, position.dtype)

        def once(carry: Any, key: Any) -> Any:
            position, momentum = carry
            return one_step(key, position, momentum, gradient(position), size), None

        keys = jax.random.split(key_noise, self.num_integration_steps)
        return lax.scan(once, (position, momentum), keys)[0][0]

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of an unconstrained position."""
        return target.flat().constrain(position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune nothing: without a rejection nothing tells whether a step size is good."""
        del target, state
        return Adaptation.none()


def sgld(minibatch: Minibatch, *, step_size: float | Callable[[Any], Any]) -> StochasticGradient:
    r"""Stochastic gradient Langevin dynamics, by BlackJAX. **Biased** at a constant step size.

    On the unconstrained scale, with $\hat g$ the gradient of the log density of one minibatch's posterior,

    $$u_{n+1} = u_n + \epsilon_n\, \hat g(u_n) + \sqrt{2 \epsilon_n}\, \xi_n, \qquad \xi_n \sim N(0, I).$$

    Nothing is rejected. At a constant $\epsilon$ the stationary law is not the posterior: of a normal posterior with
    variance $s^2$, and gradients with a noise of variance $v$, it has variance
    $s^2 (1 + \epsilon v / 2) / (1 - \epsilon / 2 s^2)$. It tends to the posterior as $\epsilon_n \to 0$ with
    $\sum \epsilon_n = \infty$ and $\sum \epsilon_n^2 < \infty$, where the draws are weighted by $\epsilon_n$.

    Args:
        minibatch: `minibatch(key)` returns the posterior of one random batch, scaled to the whole data set
            (`ex.with_data_subsample`), with the same latents as the target.
        step_size: $\epsilon$, or a function of the number $n$ of steps made, such as `lambda n: 0.1 * (1 + n) ** -0.55`.

    Returns:
        A `Kernel` for `mcmc`, to be used alone: it is not exact, and knows how many steps it made.

    Raises:
        TypeError: `minibatch` is no function.
        ValueError: the step size is not positive.
        ShapeError: a minibatch's posterior has other latents.

    Source: Welling and Teh 2011; the bias: Vollmer, Zygalakis and Teh 2016.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model(number):
        ...     mean = ex.sample("mean", dist.Normal(0.0, 10.0))
        ...     ex.sample("y", dist.Normal(mean, 1.0).expand([number]))
        >>> data = jnp.linspace(1.0, 3.0, 100)
        >>> def minibatch(key):
        ...     batch = jax.random.choice(key, data, (10,), replace=False)
        ...     return ex.with_data_subsample(model(10), "y", total=100).given({"y": batch})
        >>> chains = inference.mcmc(
        ...     model(100).given({"y": data}), inference.sgld(minibatch, step_size=1e-3), key=jax.random.key(0)
        ... )
        >>> bool(abs(chains.mean()["mean"] - 2.0) < 0.05)
        True
    """
    _check(minibatch, step_size, "sgld")
    return StochasticGradient("sgld", minibatch, step_size)


def sghmc(
    minibatch: Minibatch,
    *,
    step_size: float | Callable[[Any], Any],
    num_integration_steps: int = 10,
    friction: float = 1.0,
) -> StochasticGradient:
    r"""Stochastic gradient Hamiltonian Monte Carlo, with BlackJAX's integrator. **Biased** at a constant step size.

    A fresh momentum $p \sim N(0, I)$ goes some steps with friction $\alpha$ and the noise that balances it:

    $$u' = u + \epsilon p, \qquad p' = (1 - \alpha \epsilon)\, p + \epsilon\, \hat g(u) + \sqrt{2 \alpha \epsilon}\, \xi.$$

    Nothing is rejected, and the gradient's own noise is not subtracted: the bias vanishes with $\epsilon$.

    Args:
        minibatch: as in `sgld`.
        step_size: $\epsilon$, or a function of the number of steps made.
        num_integration_steps: steps with one momentum, all on one minibatch.
        friction: $\alpha > 0$.

    Returns:
        A `Kernel` for `mcmc`, to be used alone.

    Raises:
        TypeError: `minibatch` is no function.
        ValueError: a setting is out of range.
        ShapeError: a minibatch's posterior has other latents.

    Sources: Chen, Fox and Guestrin 2014; Ma, Chen and Fox 2015.

    Example: see `sgld`.
        >>> from expectax import inference
        >>> inference.sghmc(lambda key: None, step_size=0.01).name
        'sghmc'
    """
    _check(minibatch, step_size, "sghmc")
    if num_integration_steps < 1 or not friction > 0:
        raise ValueError(
            f"sghmc: need num_integration_steps >= 1 and friction > 0, got {num_integration_steps} and {friction}."
        )
    return StochasticGradient("sghmc", minibatch, step_size, num_integration_steps, friction)


def _check(minibatch: Any, step_size: Any, what: str) -> None:
    if not callable(minibatch):
        raise TypeError(f"{what} takes a function minibatch(key) that returns a posterior, got {minibatch!r}.")
    if not callable(step_size) and not step_size > 0:
        raise ValueError(f"{what}: need step_size > 0, got {step_size}.")
