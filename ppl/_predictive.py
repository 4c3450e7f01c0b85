r"""Prior and posterior prediction, and the pointwise log-likelihood, in chunks of bounded memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpyro import distributions as dist

from . import _jax
from ._choices import check_support, unknown
from ._compile import compiled
from ._errors import AddressError, ShapeError, SupportError
from ._nested import Choices, leaves_of, merged, nested
from ._posterior import Posterior
from ._program import Program, model, program_of
from ._rewrite import Place, rewritten
from ._staging import check_key, stage
from ._visitors import recording_all


def predictive(
    target: Program | Posterior,
    draws: Choices | None = None,
    *,
    key: Any,
    num_samples: int | None = None,
    batch_size: int | None = None,
) -> Choices:
    r"""Run a program forwards at given draws: posterior prediction, $y^{new} \sim p(y \mid z)$ with $z$ the draws.

    Args:
        target: a bound program, or a posterior, whose observations are forgotten. So is what the program observes.
        draws: nested dict of latents with one or more leading axes (`chains.choices`, or resampled particles); other
            choices are drawn. None: prior prediction.
        key: a typed key.
        num_samples: how many prior draws, if there are no `draws`.
        batch_size: how many draws are run at once; all, if None. It bounds the memory for what lies between.

    Returns:
        Nested dict of the choices that were not among the draws, and of recorded values, with the draws' leading axes.

    Raises:
        AddressError: a draw names no choice of the program.
        ShapeError: draws have no common leading axes.
        ValueError: neither or both of `draws` and `num_samples` are given, or one number is not positive.

    A second call with new draws of the same shapes compiles nothing.

    Source: Gelman et al., Bayesian Data Analysis, chapter 6.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def coin():
        ...     p = ex.sample("p", dist.Beta(1.0, 1.0))
        ...     ex.sample("heads", dist.Bernoulli(p))
        >>> draws = {"p": jax.numpy.array([0.0, 1.0])}
        >>> ex.predictive(coin().given({"heads": 1}), draws, key=jax.random.key(0))["heads"].tolist()
        [0, 1]
    """
    check_key(key)
    if (draws is None) == (num_samples is None):
        raise ValueError(f"predictive at {_jax.caller()} takes either draws or num_samples.")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise ValueError(f"predictive at {_jax.caller()}: num_samples is a positive whole number, got {num_samples!r}.")
    _check_batch_size(batch_size, "predictive")
    program = _freed(program_of(target, "predictive"))
    observed = dict(leaves_of(target.observations)) if isinstance(target, Posterior) else {}
    table = stage(program).table
    if draws is None:
        assert num_samples is not None
        leading, flat = (num_samples,), {}
    else:
        kept = nested((p, v) for p, v in leaves_of(draws) if p not in observed)
        leading, flat = _flattened(kept, table, "predictive")
    found, possible = _predict(program, flat, jax.random.split(key, math.prod(leading)), batch_size)
    _check_possible(possible, leading, "predictive")
    return jax.tree.map(lambda v: jnp.reshape(v, (*leading, *v.shape[1:])), found)


def _check_batch_size(batch_size: Any, what: str) -> None:
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"{what} at {_jax.caller()}: batch_size is a positive whole number, got {batch_size!r}.")


@compiled
def _predict(program: Program, draws: Choices, keys: Any, batch_size: int | None) -> tuple[Choices, Any]:
    given = dict(leaves_of(draws))

    def one(inputs: Any) -> tuple[Choices, Any]:
        key, values = inputs
        trace, log_weight = program.generate(key, values)
        new = nested((path, v) for path, v in leaves_of(trace.choices) if path not in given)
        return merged(new, trace.deterministic), jnp.isfinite(log_weight)

    return _mapped(one, (keys, draws), batch_size)


def _check_possible(possible: Any, leading: tuple[int, ...], what: str) -> None:
    """Refuse draws that the program gives no density: what would follow from them has no meaning."""
    if _jax.is_traced(possible) or np.all(possible):
        return
    index = np.unravel_index(int(np.argmin(np.asarray(possible))), leading)
    raise SupportError(
        f"{what} at {_jax.caller()}: {int(np.sum(~np.asarray(possible)))} of {possible.size} draws have no finite density "
        f"under the program (nan, or outside a support); the first is number {tuple(int(i) for i in index)}."
    )


def _mapped(function: Any, inputs: Any, batch_size: int | None) -> Any:
    count = len(jax.tree.leaves(inputs)[0])
    if batch_size is None or batch_size >= count:
        return jax.vmap(function)(inputs)
    return lax.map(function, inputs, batch_size=batch_size)


@model
def _freed(program: Program) -> Any:
    """Return the program with its observed sites as choices again."""

    def rule(place: Place) -> Any:
        if not place.site.fixed or not place.site.observed or isinstance(place.distribution, dist.Unit):
            return place.bind()
        return place.bind(value=None)

    return rewritten(program, rule)


def _flattened(draws: Choices, table: Any, what: str) -> tuple[tuple[int, ...], Choices]:
    """Return the common leading axes of draws, and the draws with one leading axis."""
    sites = dict(leaves_of(table))
    leading: tuple[int, ...] | None = None
    flat = {}
    for path, value in leaves_of(draws):
        entry = sites.get(path)
        if entry is None:
            choices = {p: e for p, e in sites.items() if e.kind == "choice"}
            raise AddressError(unknown(path, table, choices, what, _jax.caller()))
        if entry.kind == "deterministic":
            continue  # it is computed again
        shape, own = jnp.shape(value), entry.shape
        batch = shape[: len(shape) - len(own)]
        if shape[len(batch) :] != own or not batch or (leading is not None and batch != leading):
            raise ShapeError(
                f"{what} at {_jax.caller()}: draws of {path!r} have shape {shape}; expected the draws' leading axes "
                f"{'' if leading is None else leading} and then the site's shape {own}."
            )
        leading = batch
        if not _jax.is_traced(value):
            check_support(f"{what} at {_jax.caller()}: draws of site {path!r}", entry, np.asarray(value), None)
        flat[path] = jnp.reshape(jnp.asarray(value), (math.prod(batch), *own))
    if leading is None:
        raise ShapeError(f"{what} at {_jax.caller()}: there are no draws in {sorted(draws)}.")
    return leading, nested(flat.items())


def log_likelihood(posterior: Posterior | Program, draws: Choices, *, batch_size: int | None = None) -> Choices:
    r"""Return the pointwise log-likelihood $\log p(y_i \mid z)$ of the observations at given draws.

    Args:
        posterior: a posterior, or a program that observes data itself.
        draws: nested dict of latents with one or more leading axes.
        batch_size: as in `predictive`.

    Returns:
        Nested dict by observed address: an array of the draws' leading axes and then one number per element (time,
        lanes, batch) of the data; 0 for missing elements.

    Raises:
        AddressError: a draw names no latent, or a latent has no draw.
        ShapeError: draws have no common leading axes.
        ValueError: `batch_size` is not a positive whole number.
        ControlFlowError: the program is one of `marginalize_discrete`, which has no densities by site.

    Example:
        >>> import jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def normal():
        ...     m = ex.sample("m", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(jnp.full(3, m), 1.0))
        >>> posterior = normal().given({"y": jnp.zeros(3)})
        >>> ex.log_likelihood(posterior, {"m": jnp.zeros(5)})["y"].shape
        (5, 3)
    """
    program_of(posterior, "log_likelihood")
    _check_batch_size(batch_size, "log_likelihood")
    target: Posterior = posterior.given({}) if isinstance(posterior, Program) else posterior
    entries = target.latent_sites()
    leading, flat = _flattened(draws, entries, "log_likelihood")
    found, possible = _likelihood(target, flat, batch_size)
    _check_possible(possible, leading, "log_likelihood")
    return jax.tree.map(lambda v: jnp.reshape(v, (*leading, *v.shape[1:])), found)


@compiled
def _likelihood(posterior: Posterior, draws: Choices, batch_size: int | None) -> tuple[Choices, Any]:
    staged = stage(posterior.program)
    observed = {path for path, _ in leaves_of(posterior.observations)}
    observed |= {p for p, e in leaves_of(staged.table) if e.kind == "observed" and e.site.observed}
    latent = {path for path, _ in leaves_of(posterior.latent_sites())} - observed
    masks = {path: y.mask for path, y in leaves_of(posterior.observations) if hasattr(y, "mask")}

    def one(latents: Choices) -> tuple[Choices, Any]:
        given = posterior._complete(staged, latents, "log_likelihood")
        scores = dict(leaves_of(staged.run(recording_all, given=given).choices))
        for path, mask in masks.items():
            scores[path] = jnp.where(mask, scores[path], 0.0)
        possible = [jnp.all(jnp.isfinite(score)) for path, score in scores.items() if path in latent]
        shown = nested((path, score) for path, score in scores.items() if path in observed)
        return shown, jnp.all(jnp.asarray(possible, bool))

    return _mapped(one, draws, batch_size)
