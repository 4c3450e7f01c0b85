r"""Elliptical slice sampling of latents with a Gaussian prior."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from numpyro import distributions as dist

from expectax.ppl import DistributionError, Posterior, Selection
from expectax.ppl._dependence import dependences
from expectax.ppl._evaluate import Visit, Visitor, plain
from expectax.ppl._finite import innermost
from expectax.ppl._keyless import random_key
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._sample import lanes_of
from expectax.ppl._staging import stage

from ._accept import check_exact_density, chosen
from ._kernel import Adaptation, Info, State
from ._on import On, on
from ._target import Target

_MOST_SHRINKS = 100
"""After so many tries the bracket is as narrow as a rounding error; the chain then stays, which is exact too."""

_GAUSSIAN = (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)


class EllipticalSlice(eqx.Module):
    """An elliptical slice kernel; made by `elliptical_slice`. Example: see `elliptical_slice`."""

    name: str = eqx.field(static=True, default="elliptical_slice")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density; refuse those without a Gaussian prior."""
        check_exact_density(target, self.name)
        prior_mean(target.posterior)
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Draw an ellipse from the prior, and a point of the slice on it."""
        del parameters
        posterior = target.posterior
        here, mean = state.position, prior_mean(posterior)
        drawn = posterior.latents(posterior.program.rebind(_given(posterior)).choices)
        log_likelihood = lambda z: target.log_density(z) - prior_log_density(posterior, z)  # noqa: E731
        key_level, key_angle = jax.random.split(random_key())
        # 1 - u lies in (0, 1], so that the slice always holds the present point
        level = log_likelihood(here) + jnp.log1p(-jax.random.uniform(key_level))

        def at(angle: Any) -> Choices:
            one = lambda m, x, v: m + (x - m) * jnp.cos(angle) + (v - m) * jnp.sin(angle)  # noqa: E731
            return jax.tree.map(one, mean, here, drawn)

        def try_one(carry: Any) -> Any:
            key, low, high, _, tries, _ = carry
            key, now = jax.random.split(key)
            angle = jax.random.uniform(now, minval=low, maxval=high)
            low, high = jnp.where(angle < 0, angle, low), jnp.where(angle < 0, high, angle)
            return key, low, high, angle, tries + 1, log_likelihood(at(angle)) >= level

        def go_on(carry: Any) -> Any:
            return ~carry[5] & (carry[4] < _MOST_SHRINKS)

        key_angle, key_first = jax.random.split(key_angle)
        first = jax.random.uniform(key_first, maxval=2 * jnp.pi)
        found = log_likelihood(at(first)) >= level
        start = (key_angle, first - 2 * jnp.pi, first, first, jnp.ones((), int), found)
        _, _, _, angle, tries, found = lax.while_loop(go_on, try_one, start)
        there = at(angle)
        after = chosen(found, State(there, target.log_density(there)), state)
        return after, Info(found.astype(float), num_steps=tries, energy=-after.log_density)

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune nothing."""
        del target, state
        return Adaptation.none()


def _given(posterior: Posterior) -> Choices:
    """Return the observations as plain values."""
    given = ((p, y.value if isinstance(y, Masked) else y) for p, y in leaves_of(posterior.observations))
    return nested(given)


def prior_log_density(posterior: Posterior, latents: Choices) -> Any:
    """Return the log density of the latents' own sites."""
    terms = dict(leaves_of(posterior.site_log_densities(latents)))
    return sum((jnp.sum(terms[path]) for path, _ in leaves_of(posterior.latent_sites())), jnp.zeros(()))


def prior_mean(posterior: Posterior) -> Choices:
    """Return the means of the latents' sites; refuse a site that is not Gaussian given all else."""
    staged, entries = stage(posterior.program), dict(leaves_of(posterior.latent_sites()))
    parents = dependences(staged.jaxpr).parents
    for path, entry in entries.items():
        own = sorted(parents.get(path, frozenset()) & entries.keys())
        why = None
        if own:
            why = f"depends on {', '.join(map(repr, own))}, which moves too"
        elif entry.conditional or entry.missing is not None:
            why = "stands in a branch, has a mask or is partly observed"
        elif "scale" in entry.site.extras:
            why = "has a scaled density"
        if why is not None:
            raise _refused(entry.site, why)
    return posterior.latents(staged.run(_means, given=_given(posterior)).choices)


def _refused(site: Any, why: str) -> DistributionError:
    return DistributionError(
        f"elliptical_slice: site {site.address!r} at {site.where} {why}, but its prior given all else must be Gaussian: a "
        "Normal or MultivariateNormal that depends on no latent that moves with it. Move such sites one by one, as in "
        "inference.cycle(inference.elliptical_slice('x'), ...), or by another kernel."
    )


def _mean(site: Any, leaves: Any, source: Any, given: Any, mask: Any) -> Visit:
    """Take the given value, or the mean of a Gaussian."""
    del source, mask
    if given is not None:
        return Visit(plain(given), plain(given), 0.0, 0.0)
    kind = type(innermost(site.distribution(leaves)))
    if kind not in _GAUSSIAN:
        raise _refused(site, f"has the distribution {kind.__name__}")
    value = lanes_of(site, lambda xs: jnp.broadcast_to(site.distribution(xs).mean, site.shape), leaves=leaves)
    return Visit(value, value, 0.0, 0.0)


_means = Visitor(_mean, kind="mean")


def elliptical_slice(selection: str | Selection | None = None) -> EllipticalSlice | On:
    r"""Elliptical slice sampling, for latents whose prior given all else is Gaussian: no step size, no gradient.

    With $z \sim N(m, \Sigma)$ and likelihood $L(z) = \gamma(z) / N(z; m, \Sigma)$, a draw $\nu$ of the prior spans the ellipse

    $$z(\theta) = m + (z - m) \cos\theta + (\nu - m) \sin\theta,$$

    on which $\theta$ is drawn from $\{L(z(\theta)) \ge u L(z)\}$, $u \sim U(0, 1)$, by a bracket that shrinks towards 0.

    Args:
        selection: the sites to move, as in `on`; all latents, if None. They are `Normal` or `MultivariateNormal`, with any
            mean and covariance, which may depend on other choices but not on each other.

    Returns:
        A `Kernel` for `mcmc` and for the combinators.

    Raises:
        DistributionError: a site is not Gaussian given all else, or the target's density is only estimated.
        AddressError: the selection is unknown.

    Source: Murray, Adams and MacKay 2010.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def process(covariance):
        ...     f = ex.sample("f", dist.MultivariateNormal(jnp.zeros(3), covariance))
        ...     ex.sample("y", dist.Poisson(jnp.exp(f)))
        >>> covariance = 0.5 * jnp.eye(3) + 0.5
        >>> posterior = process(covariance).given({"y": jnp.array([3, 2, 4])})
        >>> chains = inference.mcmc(posterior, inference.elliptical_slice(), key=jax.random.key(0), num_warmup=50)
        >>> chains.choices["f"].shape
        (4, 1000, 3)
    """
    return EllipticalSlice() if selection is None else on(selection, EllipticalSlice())
