r"""Reparameterisation: the same density, written with a base variable that is easier to sample.

With a location-scale site $x \sim D(\mu, \sigma)$ and centredness $c$: $e \sim D(c\mu, \sigma^c)$ and
$x = \mu + \sigma^{1-c} (e - c\mu)$; $c = 0$ is non-centred, $c = 1$ leaves the site as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from numpyro import distributions as dist

from . import _jax
from ._compile import Fixed, compiled
from ._dependence import dependences
from ._errors import AddressError, DistributionError, SupportError
from ._nested import Choices, leaves_of, nested
from ._observe import deterministic
from ._posterior import Posterior, is_discrete
from ._program import Program, model, program_of
from ._rewrite import Place, rewritten
from ._selection import chosen_by
from ._staging import check_key, stage

_LOCATION_SCALE = (dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace, dist.Logistic, dist.Gumbel)


def reparameterize(
    target: Program | Posterior, selection: Any = "auto", *, centred: float = 0.0, key: Any = None
) -> Any:
    r"""Write location-scale sites with a base variable: `theta` becomes `theta_base`, and `theta` is recorded.

    Args:
        target: a bound program, or a posterior, whose observations stay.
        selection: the sites to write anew, or `"auto"`: a posterior's latents whose location or scale depends on other
            latents are non-centred where the data say less of them than their prior does. A short pilot (mean-field
            variational inference in unconstrained space) finds out: with $I$ the expected curvature of the rest of
            the log density and $\sigma$ the scale, a site stays centred if the mean of $I \sigma^2$ exceeds 1.
        centred: $c$, in $[0, 1]$.
        key: a typed key, for `"auto"`.

    Returns:
        A program, or a posterior, with the same density of `theta`.

    Raises:
        AddressError: the selection is unknown, or names an observed site.
        DistributionError: a selected site is scaled, or has no location-scale distribution (Normal, StudentT, Cauchy, Laplace,
            Logistic, Gumbel, LogNormal, MultivariateNormal with `scale_tril`; also expanded, or `to_event`).
        TypeError: `"auto"` without a posterior or without a key.
        ValueError: `centred` outside [0, 1].

    Source: Papaspiliopoulos, Roberts and Skold 2007; Gorinova, Moore and Hoffman 2020.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def funnel():
        ...     scale = ex.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     ex.sample("x", dist.Normal(0.0, scale).expand([3]))
        >>> trace = ex.reparameterize(funnel(), "x").simulate(jax.random.key(0))
        >>> bool(abs(trace["x"] - trace["scale"] * trace["x_base"]).max() < 1e-6)
        True
    """
    program = program_of(target, "reparameterize")
    if not 0.0 <= centred <= 1.0:
        raise ValueError(f"reparameterize at {_jax.caller()}: centred lies in [0, 1], got {centred}.")
    sites = dict(leaves_of(program.sites()))
    observed = dict(leaves_of(target.observations)) if isinstance(target, Posterior) else {}
    if isinstance(selection, str) and selection == "auto":
        if not isinstance(target, Posterior) or key is None:
            raise TypeError(
                f"reparameterize at {_jax.caller()}: 'auto' needs a posterior, program.given(...), and "
                "key=jax.random.key(...)."
            )
        chosen = _automatic(target, key)
    else:
        wanted = chosen_by(selection, program.sites(), "reparameterize")
        chosen = [path for path, mask in wanted.items() if mask is not False]
    for path in chosen:
        if path in observed:
            raise AddressError(f"reparameterize at {_jax.caller()}: site {path!r} is observed.")
        entry = sites[path]
        if entry.joint:
            raise DistributionError(
                f"reparameterize at {_jax.caller()}: {path!r} (at {entry.site.where}) has a density that is estimated or "
                "summed. Reparameterize the program that vi.marginal or vi.normalize is made of."
            )
        if not _is_location_scale(entry.site.distribution([None] * entry.site.structure.num_leaves)):
            raise DistributionError(
                f"reparameterize at {_jax.caller()}: site {path!r} (at {entry.site.where}) has no location and scale."
            )
    new = _reparameterized(program, tuple(sorted(chosen)), Fixed(float(centred))) if chosen else program
    return new.given(target.observations) if isinstance(target, Posterior) else new


@model
def _reparameterized(program: Program, paths: tuple[str, ...], centred: Fixed) -> Any:
    """`centred` is fixed, as a rule may not close over a traced value: parts of the program are traced by themselves."""

    def rule(place: Place) -> Any:
        if place.path not in paths:
            return place.bind()
        if "scale" in place.extras:
            raise DistributionError(
                f"reparameterize: site {place.path!r} at {place.site.where} has a scaled density, which a change of "
                "variables does not keep. Reparameterize first, then scale."
            )
        base, back = split(place.distribution, centred.value)
        return deterministic(place.address, back(place.bind(f"{place.address}_base", base)))

    return rewritten(program, rule)


def _is_location_scale(d: Any) -> bool:
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return type(d) in (*_LOCATION_SCALE, dist.LogNormal, dist.MultivariateNormal)


def split(d: Any, centred: Any) -> tuple[Any, Any]:
    """Return the base distribution, and the map from its value back to the value of `d`."""
    if isinstance(d, dist.Independent):
        base, back = split(d.base_dist, centred)
        return base.to_event(d.reinterpreted_batch_ndims), back
    if isinstance(d, dist.ExpandedDistribution):
        base, back = split(d.base_dist, centred)
        return base.expand(d.batch_shape), back
    if type(d) is dist.MultivariateNormal:
        factor: Any = d.scale_tril
        root = (1.0 - centred) * jnp.eye(d.event_shape[0]) + centred * factor
        base = dist.MultivariateNormal(centred * d.loc, scale_tril=root)

        def unwhitened(e: Any) -> Any:
            flat = jax.scipy.linalg.solve_triangular(root, (e - centred * d.loc)[..., None], lower=True)
            return d.loc + (factor @ flat)[..., 0]

        return base, unwhitened
    loc, scale = d.loc, d.scale
    small = scale**centred
    if type(d) is dist.StudentT:
        base = dist.StudentT(d.df, centred * loc, small)
    else:
        base = (dist.Normal if type(d) is dist.LogNormal else type(d))(centred * loc, small)

    def back(e: Any) -> Any:
        x = loc + scale ** (1.0 - centred) * (e - centred * loc)
        return jnp.exp(x) if type(d) is dist.LogNormal else x

    return base, back


# --- the automatic choice ---------------------------------------------------------------------------------------


def _automatic(posterior: Posterior, key: Any, num_draws: int = 32) -> list[str]:
    """Return the latents that are better non-centred; see `reparameterize`."""
    check_key(key)
    for path, entry in leaves_of(posterior.latent_sites()):
        if is_discrete(entry):
            raise SupportError(
                f"reparameterize at {_jax.caller()}: the automatic choice needs continuous latents; {path!r} (at "
                f"{entry.site.where}) is discrete."
            )
    known = dependences(stage(posterior.program).jaxpr)
    latents = dict(leaves_of(posterior.latent_sites()))
    candidates = [
        path
        for path, entry in latents.items()
        if known.parents[path] & set(latents)
        and entry.missing is None
        and _is_location_scale(entry.site.distribution([None] * entry.site.structure.num_leaves))
    ]
    if not candidates:
        return []
    key_pilot, key_probe = jax.random.split(key)
    draws = _pilot(posterior, key_pilot, num_draws)
    information = _information(posterior, draws, tuple(candidates), key_probe)
    return [path for path in candidates if float(information[path]) < 1.0]


@compiled
def _pilot(posterior: Posterior, key: Any, num_draws: int, num_steps: int = 500) -> Choices:
    """Return latents drawn from a mean-field approximation."""
    shapes = posterior.unconstrained_shapes
    flat = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    optimizer = optax.adam(0.05)

    def noise(key: Any, like: Any) -> Any:
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, (8, *leaf.shape), leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    def loss(params: Any, key: Any) -> Any:
        mean, log_sd = params
        eps = noise(key, mean)
        u = jax.tree.map(lambda m, s, e: m + jnp.exp(s) * e, mean, log_sd, eps)
        density = jax.vmap(posterior.unconstrained_log_density)(u)
        return -jnp.mean(density) - sum(jnp.sum(s) for s in jax.tree.leaves(log_sd))

    def step(state: Any, key: Any) -> Any:
        params, memory = state
        gradient = jax.tree.map(jnp.nan_to_num, jax.grad(loss)(params, key))
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), None

    params = (flat, jax.tree.map(lambda x: jnp.full_like(x, -1.0), flat))
    key_fit, key_draw = jax.random.split(key)

    @jax.jit
    def run(params: Any) -> Any:
        (mean, log_sd), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key_fit, num_steps))[
            0
        ]

        def draw(key: Any) -> Any:
            u = jax.tree.map(lambda m, s, e: m + jnp.exp(s) * e[0], mean, log_sd, noise(key, mean))
            return posterior.constrain(u)

        return jax.vmap(draw)(jax.random.split(key_draw, num_draws))

    return run(params)


@compiled
def _information(posterior: Posterior, draws: Choices, paths: tuple[str, ...], key: Any) -> dict[str, Any]:
    r"""Return for each site the mean of $-\sigma^2\, \partial^2 (\log p - \log p_{\text{site}}) / \partial x^2$."""

    def one(latents: Choices, key: Any) -> dict[str, Any]:
        found = {}
        for path in paths:
            others = {p: v for p, v in leaves_of(latents) if p != path}
            x = dict(leaves_of(latents))[path]

            def total(x: Any, path: str = path, others: Any = others) -> Any:
                return posterior.log_density(nested({**others, path: x}.items()))

            def own(x: Any, path: str = path, others: Any = others) -> Any:
                scores = posterior.site_log_densities(nested({**others, path: x}.items()))
                return jnp.sum(dict(leaves_of(scores))[path])

            probe = jax.random.rademacher(key, jnp.shape(x), jnp.result_type(x))
            curvature = [jnp.sum(probe * jax.jvp(jax.grad(f), (x,), (probe,))[1]) for f in (total, own)]
            found[path] = (curvature[0] - curvature[1], curvature[1])
        return found

    keys = jax.random.split(key, len(jax.tree.leaves(draws)[0]))
    pairs = jax.jit(jax.vmap(one))(draws, keys)
    # the prior's curvature -1/sigma^2 is what the rest is measured by
    return {path: jnp.sum(rest) / jnp.minimum(jnp.sum(prior), -1e-30) for path, (rest, prior) in pairs.items()}
