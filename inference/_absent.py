r"""The density of latents that are not made: in a branch that is not taken, or masked.

A chain keeps a number for them all the same. So that its target stays proper, and so that the others' posterior stays what
it is, they get a density of their own, a pseudo-prior (Carlin and Chib 1995): a standard normal on the unconstrained scale,
and the uniform law on a finite support.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Posterior
from expectax.ppl._joint_values import element_supports
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._posterior import is_discrete
from expectax.ppl._table import Entry


def conditional_paths(posterior: Posterior) -> frozenset[str]:
    """Return the latents that are not always made."""
    return frozenset(path for path, entry in leaves_of(posterior.latent_sites()) if entry.conditional)


def absent_log_density(posterior: Posterior, latents: Choices, paths: frozenset[str]) -> Any:
    """Return the log pseudo-prior of those latents among `paths` that are not made."""
    entries, values = dict(leaves_of(posterior.latent_sites())), dict(leaves_of(latents))
    present, total = posterior.present(latents), jnp.zeros(())
    for path in sorted(paths):
        terms = _pseudo_prior(posterior, path, entries[path], values[path])
        total = total + jnp.sum(jnp.where(present[path], 0.0, terms))
    return total


def _pseudo_prior(posterior: Posterior, path: str, entry: Entry, value: Any) -> Any:
    """Return the log pseudo-prior of each element."""
    if entry.missing is not None:
        raise _refused(entry, path, "is partly observed")
    if is_discrete(entry):
        count = element_supports(posterior)[path].shape[0]
        if count == 0:
            raise _refused(entry, path, "has no finite, known support")
        return jnp.full(entry.elements, -jnp.log(count))
    support = entry.site.support
    if support is None:
        raise _refused(entry, path, "has a support that depends on other choices")
    bijection = dist.biject_to(support)
    unconstrained = bijection.inv(value)
    jacobian = bijection.log_abs_det_jacobian(unconstrained, value)
    return _per_element(dist.Normal(0.0, 1.0).log_prob(unconstrained), entry) - _per_element(jacobian, entry)


def _per_element(terms: Any, entry: Entry) -> Any:
    """Sum over the axes of an event."""
    return jnp.sum(terms, axis=tuple(range(len(entry.elements), jnp.ndim(terms))))


def _refused(entry: Entry, path: str, why: str) -> ControlFlowError:
    return ControlFlowError(
        f"site {path!r} at {entry.site.where} stands in a branch or has a mask, and {why}, so that it has no density where "
        "it is not made. Draw it in every branch, or use a kernel on the unconstrained scale alone, such as nuts()."
    )
