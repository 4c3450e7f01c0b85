r"""Replica exchange: copies of a chain at flatter and flatter targets, which swap their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Posterior, sample
from expectax.ppl._joint_values import joint_values
from expectax.ppl._masked import Masked, expand
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._posterior import is_discrete

from ._accept import check_exact_density
from ._kernel import Adaptation, Info, Kernel, Stage, State
from ._on import adaptation_of, check_memoryless, moved_by
from ._target import Target

Tempered = Literal["likelihood", "density"]


class ReplicaExchange(eqx.Module):
    """Chains at several temperatures; made by `replica_exchange`. Example: see `replica_exchange`."""

    kernel: Kernel
    inverse_temperatures: tuple[float, ...] = eqx.field(static=True)
    tempered: Tempered = eqx.field(static=True)
    extended: bool = eqx.field(static=True, default=True)

    @property
    def name(self) -> str:
        """Show the kernel and the number of replicas."""
        return f"replica_exchange({self.kernel.name}, {len(self.inverse_temperatures)})"

    def init(self, target: Target, latents: Choices) -> State:
        """Put all replicas at the latents; the cache says which pairs swap next."""
        check_exact_density(target, "replica_exchange")
        count = len(self.inverse_temperatures)
        position = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), latents)
        return State(position, target.log_density(latents), jnp.zeros((), jnp.int32))

    def stationary(self, target: Target, latents: Choices) -> State:
        """Draw the other replicas from their own laws: of finite latents, or from the prior where the temperature is infinite."""
        others = [self._exact(target, beta) for beta in self.inverse_temperatures[1:]]
        position = jax.tree.map(lambda *xs: jnp.stack(xs), latents, *others)
        parity = sample("parity", dist.Bernoulli(0.5)).astype(jnp.int32)
        return State(position, target.log_density(latents), parity)

    def _exact(self, target: Target, beta: float) -> Choices:
        posterior = target.posterior
        if beta == 0.0 and self.tempered == "likelihood":
            drawn = posterior.program.rebind().choices
            return jax.tree.map(lambda x, s: x.astype(s.dtype), posterior.latents(drawn), posterior.latent_shapes)
        remedy = "Without finite latents only replicas at 1 and 0 are drawn exactly."
        values = joint_values(posterior, "replica_exchange", conditional=True, remedy=remedy)
        logits = jax.vmap(self._target(target, jnp.asarray(beta)).log_density)(values)
        number = sample("replica", dist.Categorical(logits=logits))
        return jax.tree.map(lambda x: x[number], values)

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Move each replica, then swap neighbours: even pairs and odd ones by turns."""
        betas = jnp.asarray(self.inverse_temperatures, jnp.result_type(float))

        def move(beta: Any, latents: Choices, own: Any) -> Any:
            return moved_by(self.kernel, self._target(target, beta), latents, own)

        moved, states, infos = jax.vmap(move)(betas, state.position, parameters)
        order = self._swapped(target, betas, moved, state.cache)
        position = jax.tree.map(lambda x: x[order], moved)
        cold = jax.tree.map(lambda x: x[0], (position, infos))
        log_density = target.log_density(cold[0])
        info = cold[1]._replace(
            is_divergent=jnp.any(infos.is_divergent),
            num_steps=jnp.sum(infos.num_steps),
            energy=-log_density,
            parts=((states, infos),),
        )
        return State(position, log_density, 1 - state.cache), info

    def _swapped(self, target: Target, betas: Any, latents: Choices, parity: Any) -> Any:
        r"""Return which replica goes where: neighbours swap with $\min(1, e^{(\beta_k - \beta_{k+1})(V_{k+1} - V_k)})$."""
        values = jax.vmap(lambda z: self._value(target, z))(latents)
        count = len(self.inverse_temperatures)
        log_ratio = (betas[:-1] - betas[1:]) * (values[1:] - values[:-1])
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        due = jnp.arange(count - 1) % 2 == parity
        probability = jnp.where(due, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
        swap = sample("swap", dist.Bernoulli(probability)) == 1
        up, down = jnp.append(swap, False), jnp.append(jnp.zeros(1, bool), swap)
        return jnp.arange(count) + up.astype(int) - down.astype(int)

    def _value(self, target: Target, latents: Choices) -> Any:
        """Return what is tempered: the log likelihood, or the log density."""
        if self.tempered == "likelihood":
            return log_likelihood(target.posterior, latents)
        discrete = [is_discrete(entry) for _, entry in leaves_of(target.posterior.latent_sites())]
        if all(discrete):
            return target.log_density(latents)
        if any(discrete):
            raise ControlFlowError(
                "replica_exchange: a density over both discrete and continuous latents has no scale to be tempered on. Use "
                "tempered='likelihood'."
            )
        return target.unconstrained_log_density(target.unconstrain(latents))

    def _target(self, target: Target, beta: Any) -> Target:
        def correction(latents: Choices) -> Any:
            value = self._value(target, latents)
            power = jnp.where(jnp.isneginf(value), -jnp.inf, -(1 - beta) * value)
            return power if target.correction is None else power + target.correction(latents)

        return Target(target.posterior, correction)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents of the first replica, that of the posterior itself."""
        del target
        return jax.tree.map(lambda x: x[0], position)

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune the kernel of each replica on its own."""
        own = adaptation_of(self.kernel, target, self.latents(target, state.position))
        count = len(self.inverse_temperatures)

        def update(tuning: Any, stage: Stage, state: State, info: Info) -> Any:
            del state
            return jax.vmap(lambda t, s, i: own.update(t, stage, s, i))(tuning, *info.parts[0])

        def spread(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), tree)

        return Adaptation(
            spread(own.start), update, jax.vmap(own.parameters), jax.vmap(own.final), spread(own.unadapted)
        )


def log_likelihood(posterior: Posterior, latents: Choices) -> Any:
    r"""Return $\log p(y \mid z) = \log p(z, y) - \log p(z)$, with all that the program observes or weighs."""
    total = posterior.log_density_inside(latents)
    terms, observed = dict(leaves_of(posterior.site_log_densities(latents))), dict(leaves_of(posterior.observations))
    prior = jnp.zeros(())
    for path, _ in leaves_of(posterior.latent_sites()):
        own = observed.get(path)
        prior = prior + jnp.sum(
            jnp.where(expand(own.mask, terms[path]), 0.0, terms[path]) if isinstance(own, Masked) else terms[path]
        )
    return jnp.where(jnp.isneginf(total), -jnp.inf, total - prior)


def replica_exchange(
    kernel: Kernel, inverse_temperatures: Sequence[float], *, tempered: Tempered = "likelihood"
) -> ReplicaExchange:
    r"""Replica exchange (parallel tempering) over any kernel, for posteriors with several modes.

    Replica $k$ moves by the kernel on

    $$\gamma_k(z) = p(z)\, p(y \mid z)^{\beta_k}, \qquad 1 = \beta_1 > \dots > \beta_K \ge 0,$$

    and neighbours then swap with probability $\min(1, e^{(\beta_k - \beta_{k+1})(\log p(y \mid z_{k+1}) - \log p(y \mid
    z_k))})$: even pairs and odd pairs by turns. The first replica's draws are the posterior's.

    Args:
        kernel: any kernel whose state is made of the latents alone; each replica's is tuned on its own.
        inverse_temperatures: $\beta_1 = 1 > \dots > \beta_K \ge 0$.
        tempered: `"likelihood"`, as above (what the program observes, and its factors, count to it; where the likelihood is
            0, so is every $\gamma_k$); or `"density"`: the whole density to the power $\beta_k > 0$, on the unconstrained
            scale of continuous latents.

    Returns:
        A `Kernel`, whose state holds all replicas: `cycle`, `mixture` and `on` stand inside it.

    Raises:
        ValueError: the inverse temperatures are not such numbers, or `tempered` is neither.
        ControlFlowError: the whole density is tempered, but the latents are mixed.
        DistributionError: the target's density is only estimated.

    Sources: Geyer 1991; swaps by turns: Syed et al. 2022.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def two_modes():
        ...     z = ex.sample("z", dist.Normal(0.0, 5.0))
        ...     ex.sample("y", dist.Normal(jnp.abs(z), 0.3))
        >>> kernel = inference.replica_exchange(inference.random_walk(), [1.0, 0.3, 0.1, 0.03, 0.0])
        >>> posterior = two_modes().given({"y": 4.0})
        >>> chains = inference.mcmc(posterior, kernel, key=jax.random.key(0), num_warmup=300, num_samples=1000)
        >>> bool(abs((chains.choices["z"] > 0).mean() - 0.5) < 0.1)
        True
    """
    check_memoryless(kernel, "replica_exchange")
    if tempered not in ("likelihood", "density"):
        raise ValueError(f"replica_exchange: tempered is 'likelihood' or 'density', got {tempered!r}.")
    betas = tuple(float(b) for b in inverse_temperatures)
    falling = all(a > b for a, b in zip(betas, betas[1:], strict=False))
    if len(betas) < 2 or betas[0] != 1.0 or not falling or betas[-1] < 0 or (tempered == "density" and betas[-1] == 0):
        raise ValueError(
            "replica_exchange: the inverse temperatures fall from 1 to a last one >= 0 (> 0 if the whole density is "
            f"tempered), such as [1.0, 0.3, 0.1], got {list(betas)}."
        )
    return ReplicaExchange(kernel, betas, tempered)
