r"""Sequential Monte Carlo samplers, annealed importance sampling and Markov chains, as algorithms.

One algorithm has all three. Between a proposal $r$ and a target $\gamma$ lie
$\gamma_k = r^{1 - \beta_k} \gamma^{\beta_k}$, $0 < \beta_1 \le \dots \le \beta_K = 1$. At step $k$ particles are weighed by
$(\gamma / r)^{\beta_k - \beta_{k-1}}$, resampled, and moved by a kernel that leaves $\gamma_k$ invariant. One particle is
annealed importance sampling; $\beta = (1, 1, \dots, 1)$ with one particle is a Markov chain.

The kernels are reversible, so that the run backwards from a given end is the kernels in reverse order: the conditional
run is that path, with a conditional SMC around it.

Sources: Neal 2001; Del Moral, Doucet and Jasra 2006; Andrieu, Doucet and Holenstein 2010; Lew et al. 2022 (RAVI).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpyro import distributions as dist

from expectax.ppl import AddressError, DistributionError, Posterior, Program, SupportError, _jax, sample
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._nesting import nest
from expectax.ppl._staging import as_data
from expectax.ppl._support import whole_space

from ._algorithm import Proposal, Run
from ._importance import ancestors, chosen
from ._objective import log_density as score
from ._shared import check_particles, log_mean_exp

Kernel = Callable[[Callable[[Choices], Any], Choices], Choices]
"""`kernel(log_density, latents) -> latents`, a keyless program that is reversible with respect to the density."""


class Annealed(eqx.Module):
    r"""Sequential Monte Carlo over temperatures. Example: see `vi.smc`.

    Attributes:
        num_particles: how many.
        proposal: as in `vi.sir`, with an exact density.
        kernel: a `vi.random_walk(...)`, `vi.langevin(...)`, or any reversible kernel.
        temperatures: $\beta_1, \dots, \beta_K = 1$.
    """

    num_particles: int = eqx.field(static=True)
    proposal: Any
    kernel: Any
    temperatures: Float[Array, " K"]

    def run(self, target: Posterior) -> Run:
        """Return one of the last particles, chosen by weight."""
        path = _Path(self, target)
        cloud, log_w, log_z = path.forwards(path.start(self.num_particles), None)
        z = chosen(cloud, log_w)
        return Run(z, path.log_gamma(z), log_z)

    def conditional(self, target: Posterior, latents: Choices, log_density: Any) -> Any:
        """Run the kernels backwards from the given latents, and an SMC around that path."""
        del log_density
        path = _Path(self, target)
        own = path.backwards(latents)
        first = jax.tree.map(lambda x: x[:1], own)
        if self.num_particles > 1:
            others = path.start(self.num_particles - 1)
            first = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, others)
        return path.forwards(first, own)[2]


class _Path:
    """The densities between a proposal and a target, and the two runs along them."""

    def __init__(self, algorithm: Annealed, target: Posterior):
        self.algorithm, self.target = algorithm, target
        self.proposal = Proposal.of(algorithm.proposal, target)
        _refuse_estimates(self.proposal, target)
        if isinstance(algorithm.kernel, (RandomWalk, Langevin)):
            _refuse_shapes(target)
        self.betas = jnp.asarray(algorithm.temperatures, jnp.result_type(float))
        self.steps = jnp.diff(self.betas, prepend=0.0)

    def log_gamma(self, z: Choices) -> Any:
        return score(self.target, z)

    def log_ratio(self, z: Choices) -> Any:
        return self.proposal.log_weight(z, self.log_gamma(z))

    def move(self, z: Choices, beta: Any) -> Choices:
        """Move latents by the kernel of one temperature."""

        def log_density(z: Choices) -> Any:
            log_gamma = self.log_gamma(z)
            return log_gamma - (1.0 - beta) * self.proposal.log_weight(z, log_gamma)

        moved = nest("move", lambda: self.algorithm.kernel(log_density, z))
        return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), moved, z)

    def start(self, number: int) -> Choices:
        return jax.vmap(lambda _: self.proposal.draw()[0])(jnp.arange(number))

    def backwards(self, z: Choices) -> Choices:
        """Return the path that ends at given latents, along a first axis of temperatures."""

        def step(z: Choices, beta: Any) -> tuple[Choices, Choices]:
            before = self.move(z, beta)
            return before, before

        _, earlier = lax.scan(step, z, self.betas[:-1], reverse=True)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), earlier, z)

    def forwards(self, cloud: Choices, own: Choices | None) -> tuple[Choices, Any, Any]:
        """Return the last particles, their log weights, and the log evidence; the first particle keeps to a path."""

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            cloud, log_z = carry
            change, beta, following = inputs
            log_w = _tempered(change, jax.vmap(self.log_ratio)(cloud))
            index = ancestors(log_w) if log_w.size > 1 else jnp.zeros(1, int)
            cloud = jax.vmap(self.move, (0, None))(jax.tree.map(lambda x: x[index], cloud), beta)
            if following is not None:
                cloud = jax.tree.map(lambda x, path: x.at[0].set(path), cloud, following)
            return (cloud, log_z + log_mean_exp(log_w)), None

        following = None if own is None else jax.tree.map(lambda x: x[1:], own)
        inputs = (self.steps[:-1], self.betas[:-1], following)
        (cloud, log_z), _ = lax.scan(step, (cloud, jnp.zeros((), self.betas.dtype)), inputs)
        log_w = _tempered(self.steps[-1], jax.vmap(self.log_ratio)(cloud))
        return cloud, log_w, log_z + log_mean_exp(log_w)


def _tempered(change: Any, log_ratio: Any) -> Any:
    """Return the log weights of a step; where the temperature stays, an impossible particle weighs like any other."""
    return jnp.where(change == 0.0, 0.0, jnp.where(change == 0.0, 1.0, change) * log_ratio)


def _refuse_estimates(proposal: Proposal, target: Posterior) -> None:
    """Refuse densities that are estimates: a kernel evaluates them more than once."""
    for program in (target.program, proposal.program):
        entries = [] if program is None else leaves_of(program.sites())
        for path, entry in entries:
            if entry.estimated:
                raise DistributionError(
                    f"the density of {path!r} at {entry.site.where} is only estimated, but a Markov kernel needs an exact "
                    "one. Use vi.sir, whose weights may be estimates."
                )


def _refuse_shapes(target: Posterior) -> None:
    """Refuse latents on a simplex and the like, which added noise leaves at every step."""
    for path, entry in leaves_of(target.latent_sites()):
        support = entry.site.support
        if support is not None and support.event_dim > 0 and not whole_space(support):
            raise SupportError(
                f"the kernel adds noise to {path!r} at {entry.site.where}, whose support ({support}) it would leave at every "
                "step. Write a kernel of your own, or use vi.sir."
            )


# --- kernels ----------------------------------------------------------------------------------------------------


def random_walk(scale: Any) -> Kernel:
    r"""Random-walk Metropolis: propose $z + \sigma \epsilon$, accept with probability $\min(1, \gamma(z')/\gamma(z))$.

    Args:
        scale: $\sigma$, a number, or a nested dict shaped as the latents.

    Returns:
        A kernel for `vi.smc` and `vi.mcmc`; its latents are continuous.

    Source: Metropolis et al. 1953.

    Example: see `vi.smc`.
    """
    return RandomWalk(_positive(scale, "random_walk"))


class RandomWalk(eqx.Module):
    """Random-walk Metropolis. Example: see `vi.random_walk`."""

    scale: Any

    def __call__(self, log_density: Callable[[Choices], Any], z: Choices) -> Choices:
        """Move once."""
        noise = _noise(z)
        proposed = jax.tree.map(lambda x, s, e: x + s * e, z, _scales(self.scale, z), noise)
        return _accepted(z, proposed, log_density(proposed) - log_density(z))


def langevin(step_size: Any) -> Kernel:
    r"""Metropolis-adjusted Langevin: propose $z + \frac{\epsilon^2}{2} \nabla \log \gamma(z) + \epsilon \xi$.

    Args:
        step_size: $\epsilon$, a number, or a nested dict shaped as the latents.

    Returns:
        A kernel for `vi.smc` and `vi.mcmc`; its latents are continuous.

    Source: Roberts and Tweedie 1996.

    Example: see `vi.smc`, with `vi.langevin(0.5)` in place of `vi.random_walk(0.5)`.
    """
    return Langevin(_positive(step_size, "langevin"))


class Langevin(eqx.Module):
    """Metropolis-adjusted Langevin. Example: see `vi.langevin`."""

    step_size: Any

    def __call__(self, log_density: Callable[[Choices], Any], z: Choices) -> Choices:
        """Move once."""
        sizes = _scales(self.step_size, z)
        here, drift = jax.value_and_grad(log_density)(z)
        proposed = jax.tree.map(lambda x, s, g, e: x + s**2 / 2 * g + s * e, z, sizes, drift, _noise(z))
        there, back = jax.value_and_grad(log_density)(proposed)
        ratio = there - here + _log_step(proposed, back, z, sizes) - _log_step(z, drift, proposed, sizes)
        return _accepted(z, proposed, ratio)


def _log_step(start: Choices, drift: Choices, end: Choices, sizes: Choices) -> Any:
    """Return the log density of a Langevin step, up to a constant."""
    terms = jax.tree.map(lambda a, g, b, s: jnp.sum(((b - a - s**2 / 2 * g) / s) ** 2), start, drift, end, sizes)
    return -0.5 * sum(jax.tree.leaves(terms))


def _positive(scale: Any, what: str) -> Any:
    for x in jax.tree.leaves(scale := as_data(scale)):
        if not _jax.is_traced(x) and not np.all(np.asarray(x) > 0):
            raise ValueError(f"{what} needs a positive scale, got {x}.")
    return scale


def _scales(scale: Any, z: Choices) -> Choices:
    if isinstance(scale, dict) and jax.tree.structure(scale) != jax.tree.structure(z):
        raise AddressError(f"the kernel has scales for {sorted(scale)}, but the latents are {sorted(z)}.")
    return scale if isinstance(scale, dict) else jax.tree.map(lambda _: scale, z)


def _noise(z: Choices) -> Choices:
    """Draw standard normals shaped as the latents."""
    for path, x in leaves_of(z):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise DistributionError(f"a kernel that adds noise cannot move {path!r}, which is of dtype {x.dtype}.")
    leaves, structure = jax.tree.flatten(z)
    draws = [sample(f"noise{i}", dist.Normal(jnp.zeros_like(x), 1.0)) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, draws)


def _accepted(z: Choices, proposed: Choices, log_ratio: Any) -> Choices:
    """Accept or stay; what is impossible, or nan, is never accepted."""
    probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
    accept = sample("accept", dist.Bernoulli(probability)) == 1
    return jax.tree.map(lambda new, old: jnp.where(accept, new, old), proposed, z)


# --- the two constructors ---------------------------------------------------------------------------------------


def smc(num_particles: int, kernel: Kernel, *, temperatures: Any = 10, proposal: Program | Any = None) -> Annealed:
    r"""Annealed sequential Monte Carlo, as an algorithm for marginals and normalised targets.

    Args:
        num_particles: at least 1; with 1 it is annealed importance sampling (AIS).
        kernel: reversible with respect to the density it is given, `vi.random_walk(scale)` for instance.
        temperatures: $\beta_1 \le \dots \le \beta_K = 1$; a whole number $K$ means $\beta_k = (k/K)^3$.
        proposal: as in `vi.sir`; its density and the target's must be exact.

    Returns:
        An algorithm for `vi.marginal` and `vi.normalize`.

    Raises:
        ValueError: the temperatures do not rise to 1.
        DistributionError: at first use, if a density is only estimated.

    Sources: Del Moral, Doucet and Jasra 2006; Neal 2001 (AIS).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def chain():
        ...     u = ex.sample("u", dist.Normal(0.0, 1.0))
        ...     ex.sample("x", dist.Normal(u, 0.1))
        >>> marginal = vi.marginal(chain(), "x", vi.smc(200, vi.random_walk(0.5)))
        >>> log_p, _ = marginal.assess({"x": 1.0}, key=jax.random.key(0))  # exactly -1.419
        >>> bool(abs(log_p + 1.419) < 0.3)
        True
    """
    check_particles("smc", num_particles)
    if not callable(kernel):
        raise TypeError(f"smc needs a kernel such as vi.random_walk(0.5), got {kernel!r}.")
    if isinstance(temperatures, int) and not isinstance(temperatures, bool):
        if temperatures < 1:
            raise ValueError(f"smc needs at least one temperature, got {temperatures}.")
        temperatures = (np.arange(1, temperatures + 1) / temperatures) ** 3
    betas = np.asarray(temperatures, float)
    if betas.ndim != 1 or betas.size == 0 or betas[0] < 0 or np.any(np.diff(betas) < 0) or betas[-1] != 1.0:
        raise ValueError(f"smc needs temperatures that rise to 1, none below 0, got {temperatures!r}.")
    return Annealed(num_particles, as_data(proposal), kernel, jnp.asarray(betas, jnp.result_type(float)))


def mcmc(kernel: Kernel, num_steps: int, *, proposal: Program | Any = None) -> Annealed:
    r"""A Markov chain from a proposal, as an algorithm: RAVI with the chain run backwards as meta-inference.

    The evidence is estimated by the start's importance weight $\gamma(z_0)/r(z_0)$: the chain makes $z$ better, but not
    the density. Use `vi.smc` for that.

    Args:
        kernel: reversible with respect to the density it is given.
        num_steps: how often it is applied.
        proposal: as in `vi.smc`.

    Returns:
        An algorithm for `vi.marginal` and `vi.normalize`.

    Source: Lew et al. 2022 (RAVI), section 4.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def normal():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> chain = vi.normalize(normal().given({"y": 2.0}), vi.mcmc(vi.random_walk(1.0), 50))
        >>> draws = jax.vmap(chain.simulate)(jax.random.split(jax.random.key(0), 1000))
        >>> bool(abs(draws["z"].mean() - 1.0) < 0.1)
        True
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"mcmc needs a whole num_steps >= 0, got {num_steps!r}.")
    return smc(1, kernel, temperatures=np.ones(num_steps + 1), proposal=proposal)
