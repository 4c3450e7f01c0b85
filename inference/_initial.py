r"""Where chains start if they do not start anywhere: at draws of a guide, or of the normal that pathfinder finds.

Either also gives the covariance of the unconstrained latents, the first inverse mass matrix of a kernel that has one.

Source: Zhang et al. 2022 for pathfinder.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expectax.ppl import AddressError, Posterior, Program, SupportError, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._nested import Choices, leaves_of, nested

from ._hamiltonian import Hamiltonian
from ._kernel import Kernel
from ._starts import starts
from ._target import Target

_DRAWS = 1000
"""Draws of a guide that its covariance is computed from."""


def begun(posterior: Posterior, kernel: Kernel, key: Any, num_chains: int, initial: Any) -> tuple[Choices, Kernel]:
    """Return latents for each chain, chains first, and the kernel with its first inverse mass matrix.

    A kernel that was given one keeps it, and one without any is returned as it is.
    """
    dense = isinstance(kernel, Hamiltonian) and kernel.dense_mass
    if isinstance(initial, Program):
        _check_guide(posterior, initial)
        latents, covariance = _guided(posterior, initial, key, num_chains, dense)
        if not _jax.is_traced(covariance) and not np.isfinite(covariance).all():
            raise SupportError(
                "mcmc: initial: draws of the guide lie outside the posterior's support, so that they have no unconstrained "
                "values. Give each site of the guide the support of the posterior's."
            )
    elif isinstance(initial, str):
        if initial != "pathfinder":
            raise ValueError(f"mcmc: initial is 'pathfinder', a guide, or a nested dict of latents, got {initial!r}.")
        latents, covariance = _paths(posterior, key, starts(posterior, key, num_chains, None))
    else:
        return starts(posterior, key, num_chains, initial), kernel
    if isinstance(kernel, Hamiltonian) and kernel.inverse_mass_matrix is None:
        kernel = dataclasses.replace(kernel, inverse_mass_matrix=covariance)
    return latents, kernel


def _check_guide(posterior: Posterior, guide: Program) -> None:
    sites = dict(leaves_of(guide.sites()))
    missing = [path for path, _ in leaves_of(posterior.latent_shapes) if path not in sites]
    if missing:
        raise AddressError(
            f"mcmc: initial: the guide has no site {missing[0]!r}; it needs every latent, {list(sites)}."
        )


@compiled
def _guided(posterior: Posterior, guide: Program, key: Any, num_chains: int, dense: bool) -> tuple[Choices, Any]:
    """Return draws of a guide for each chain, and the covariance (or variances) of many, shrunk a little as in Stan."""
    paths = [path for path, _ in leaves_of(posterior.latent_shapes)]

    def draw(key: Any) -> Choices:
        drawn = dict(leaves_of(guide.simulate(key).choices))
        return nested((path, drawn[path]) for path in paths)

    number = max(_DRAWS, num_chains)
    draws = jax.vmap(draw)(jax.random.split(key, number))
    vectors = jax.vmap(Target(posterior).flat().unconstrain)(draws)
    size, share = vectors.shape[1], number / (number + 5.0)
    spread = jnp.cov(vectors.T).reshape(size, size) if dense else jnp.var(vectors, 0, ddof=1)
    unit = jnp.eye(size) if dense else jnp.ones(size)
    return jax.tree.map(lambda x: x[:num_chains], draws), share * spread + 1e-3 * (1 - share) * unit


@compiled
def _paths(posterior: Posterior, key: Any, start: Choices) -> tuple[Choices, Any]:
    """Return a draw of each chain's pathfinder approximation, and the mean of their covariances.

    A path that leads nowhere (a draw without a finite density) leaves its chain where it started.
    """
    from blackjax.optimizers.lbfgs import lbfgs_inverse_hessian_formula_1
    from blackjax.vi import pathfinder

    flat = Target(posterior).flat()

    def one(key: Any, latents: Choices) -> Any:
        key_path, key_draw = jax.random.split(key)
        start = flat.unconstrain(latents)
        state, _ = pathfinder.approximate(key_path, flat.log_density, start)
        sampled: Any = pathfinder.sample(key_draw, state)
        drawn = sampled[0]
        covariance = lbfgs_inverse_hessian_formula_1(state.alpha, state.beta, state.gamma)
        fine = jnp.isfinite(flat.log_density(drawn)) & jnp.isfinite(covariance).all()
        return flat.constrain(jnp.where(fine, drawn, start)), jnp.where(fine, covariance, 0.0), fine

    keys = jax.random.split(key, len(jax.tree.leaves(start)[0]))
    latents, covariances, fine = jax.vmap(one)(keys, start)
    size = covariances.shape[-1]
    mean = covariances.sum(0) / jnp.maximum(fine.sum(), 1)
    return latents, jnp.where(fine.any(), mean, jnp.eye(size, dtype=mean.dtype))
