r"""The density of latents that are not made: in a branch that is not taken, or masked.

A chain keeps a number for them all the same. So that its target stays proper, and so that the others' posterior stays what
it is, they get a density of their own, a pseudo-prior (Carlin and Chib 1995): a standard normal on the unconstrained scale,
and the uniform law on a finite support.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import ControlFlowError, Posterior, sample
from expectax.ppl._joint_values import element_supports
from expectax.ppl._masked import expand
from expectax.ppl._nested import Choices, leaves_of, merged, nested
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


def refreshed(posterior: Posterior, latents: Choices, *, strict: bool = True) -> Choices:
    """Draw the latents that are not made from the pseudo-prior; a keyless program.

    What a drawn particle, or a map from the unconstrained scale, has in their place is no draw of anything: a kernel on the
    extended space would be started wrongly. Drawing them anew is a Gibbs step. Without `strict`, latents that have no
    pseudo-prior stay as they are.
    """
    paths = conditional_paths(posterior)
    if not paths:
        return latents
    entries, values = dict(leaves_of(posterior.latent_sites())), dict(leaves_of(latents))
    present, found = posterior.present(latents), []
    for path in sorted(paths):
        try:
            drawn = _drawn(posterior, path, entries[path])
        except ControlFlowError:
            if strict:
                raise
            continue
        found.append((path, jnp.where(expand(present[path], drawn), values[path], drawn.astype(values[path].dtype))))
    return merged(latents, nested(found))


def without_absent(posterior: Posterior, latents: Choices) -> Choices:
    """Put the first value of its support in the place of each finite latent that is not made."""
    paths, found = conditional_paths(posterior), []
    present = posterior.present(latents) if paths else {}
    for path, value in leaves_of(latents):
        if path in paths:
            first = jnp.broadcast_to(element_supports(posterior)[path][0], jnp.shape(value)).astype(value.dtype)
            value = jnp.where(expand(present[path], first), value, first)
        found.append((path, value))
    return nested(found)


def _drawn(posterior: Posterior, path: str, entry: Entry) -> Any:
    """Draw from the pseudo-prior of all elements."""
    _refuse(posterior, path, entry)
    name = path.replace("/", ".")
    if is_discrete(entry):
        support = element_supports(posterior)[path]
        index = sample(f"absent {name}", dist.Categorical(logits=jnp.zeros((*entry.elements, support.shape[0]))))
        return jnp.reshape(support[index], entry.shape)
    bijection = dist.biject_to(entry.site.support)
    shape = jax.eval_shape(bijection.inv, jax.ShapeDtypeStruct(entry.shape, entry.dtype)).shape
    return bijection(sample(f"absent {name}", dist.Normal(jnp.zeros(shape), 1.0)))


def _refuse(posterior: Posterior, path: str, entry: Entry) -> None:
    """Refuse a latent without a pseudo-prior."""
    if entry.missing is not None:
        raise _refused(entry, path, "is partly observed")
    if is_discrete(entry) and element_supports(posterior)[path].shape[0] == 0:
        raise _refused(entry, path, "has no finite, known support")
    if not is_discrete(entry) and entry.site.support is None:
        raise _refused(entry, path, "has a support that depends on other choices")


def _pseudo_prior(posterior: Posterior, path: str, entry: Entry, value: Any) -> Any:
    """Return the log pseudo-prior of each element."""
    _refuse(posterior, path, entry)
    if is_discrete(entry):
        return jnp.full(entry.elements, -jnp.log(element_supports(posterior)[path].shape[0]))
    bijection = dist.biject_to(entry.site.support)
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
