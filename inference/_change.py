r"""Moves of a population to another target by programs forwards and backwards, weighed by themselves: SMCP3.

Source: Lew, Matheos, Zhi-Xuan, Ghavamizadeh, Russell and Mansinghka 2023, "SMCP3: Sequential Monte Carlo with
probabilistic program proposals".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray
from numpyro import distributions as dist

from expectax.ppl import AddressError, Posterior, Program, ShapeError, SupportError, _jax
from expectax.ppl._keyless import keyed
from expectax.ppl._match import check_drawn
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._program import bound_program
from expectax.ppl._staging import check_key

from ._population import Population, refuse_missing, weighed, whole
from ._weights import log_ratio

Transform = Callable[[Choices, Choices], tuple[Choices, Choices]]
"""`transform(latents, auxiliary) -> (new latents, new auxiliary)`, one to one."""


def change(
    population: Population,
    posterior: Posterior,
    forward: Callable[[Choices], Program] | None = None,
    backward: Callable[[Choices], Program] | None = None,
    transform: Transform | None = None,
    *,
    inverse: Transform | None = None,
    check: bool = False,
) -> Population:
    r"""Move each particle to another target: $w' = w\, \frac{\gamma'(z')\, L(l \mid z')}{\gamma(z)\, K(k \mid z)} |\det J|$.

    The forward program draws $k \sim K(\cdot \mid z)$, a bijection takes $(z, k)$ to $(z', l)$, and the backward program $L$
    says how likely $l$ is when the move is undone. The densities and the Jacobian $J$ of the continuous parts are found
    from the programs. The two targets need not share a latent: a move may translate between models.

    Args:
        population: of a whole posterior.
        posterior: the new target.
        forward: `forward(latents)`, a bound program whose choices are $k$; None for none.
        backward: `backward(new latents)`, a bound program whose sites are exactly $l$; None for none.
        transform: `transform(latents, k) -> (new latents, l)`, continuous in what is continuous. By default the new
            latents are $k$'s where it has them and the old ones elsewhere, and $l$ are the old latents that are gone.
        inverse: `inverse(new latents, l) -> (latents, k)`, for the check.
        check: run the inverse too, and make the weight of a particle nan that does not come back.
            `check_change` says which address is to blame.

    Returns:
        A population for the new target, from a keyless program. It is properly weighted if $L$ can draw every $l$ that can
        come up.

    Raises:
        AddressError, ShapeError: the transform's result does not fit the new target, or the backward program.
        SupportError: the continuous parts before and after differ in size, or one of a simplex or the like is transformed.
        ValueError: the population is in time, or there is no inverse to check.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def polar():
        ...     r = ex.sample("r", dist.HalfNormal(2.0))
        ...     angle = ex.sample("angle", dist.Uniform(-jnp.pi, jnp.pi))
        ...     ex.sample("seen", dist.Normal(r * jnp.cos(angle), 0.5))
        >>> @ex.model
        ... def plane():
        ...     x = ex.sample("x", dist.Normal(0.0, 1.0))
        ...     y = ex.sample("y", dist.Normal(0.0, 1.0))
        ...     ex.sample("seen", dist.Normal(x, 0.5))
        >>> def translate(z, k):
        ...     return {"x": z["r"] * jnp.cos(z["angle"]), "y": z["r"] * jnp.sin(z["angle"])}, {}
        >>> def run():
        ...     cloud = inference.spawn(polar().given({"seen": 0.7}), 5000)
        ...     return inference.change(cloud, plane().given({"seen": 0.7}), transform=translate).log_evidence
        >>> bool(abs(inference.keyed(run)(jax.random.key(0)) + 1.2265) < 0.1)  # exactly -1.2265
        True
    """
    whole(population, "change")
    refuse_missing(posterior, "change")
    if check and transform is not None and inverse is None:
        raise ValueError("change(check=True) needs the inverse of the transform: inverse=lambda new, l: (latents, k).")
    if transform is not None:
        _refuse_shapes(population.posterior)
        _refuse_shapes(posterior)
    move = _Move(population.posterior, posterior, forward, backward, transform, inverse)
    latents, change, error = jax.vmap(move.run)(population.latents)
    if check:
        worst = jnp.stack([jnp.max(jnp.reshape(e, (e.shape[0], -1)), axis=1) for e in error.values()])
        change = jnp.where(jnp.all(worst <= _tolerance(), axis=0), change, jnp.nan)
    return Population(posterior, latents, weighed(population.log_weights, change), population.log_offset)


def check_change(
    population: Population,
    posterior: Posterior,
    forward: Callable[[Choices], Program] | None = None,
    backward: Callable[[Choices], Program] | None = None,
    transform: Transform | None = None,
    *,
    inverse: Transform | None = None,
    key: PRNGKeyArray,
) -> None:
    """Run a `change` and its inverse, and refuse it if a particle does not come back to where it was.

    Args:
        population: some particles to try.
        posterior: as in `change`, as the other arguments.
        forward: as in `change`.
        backward: as in `change`.
        transform: as in `change`.
        inverse: as in `change`.
        key: a typed key.

    Raises:
        AssertionError: a particle does not come back (the worst address is named), or a weight is nan.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> model = ex.model(lambda: ex.sample("z", dist.Normal(0.0, 1.0)))
        >>> cloud = inference.keyed(lambda: inference.spawn(model().given({}), 5))(jax.random.key(0))
        >>> double, wrong = lambda z, k: ({"z": 2 * z["z"]}, k), lambda z, l: ({"z": z["z"]}, l)
        >>> inference.check_change(cloud, model().given({}), transform=double, inverse=wrong, key=jax.random.key(1))
        Traceback (most recent call last):
        AssertionError: change: the inverse does not lead back: of 5 particles the worst is off by ... at 'z'.
    """
    check_key(key)
    whole(population, "check_change")
    if transform is not None and inverse is None:
        raise ValueError("check_change needs the inverse of the transform: inverse=lambda new, l: (latents, k).")
    move = _Move(population.posterior, posterior, forward, backward, transform, inverse)
    _, weights, error = keyed(lambda z: jax.vmap(move.run)(z))(key, population.latents)
    worst = {path: float(np.max(np.where(np.isnan(e), np.inf, e), initial=0.0)) for path, e in error.items()}
    address = max(worst, key=lambda path: worst[path])
    number = population.log_weights.shape[0]
    if worst[address] > _tolerance():
        raise AssertionError(
            f"change: the inverse does not lead back: of {number} particles the worst is off by {worst[address]:.3g} at "
            f"{address!r}."
        )
    found = np.asarray(weights)
    before = np.asarray(jax.vmap(move.before.log_density_inside)(population.latents))
    if np.any(np.isnan(found) & np.isfinite(before)):
        raise AssertionError("change: a weight is nan; the densities or the Jacobian are not finite there.")


def _refuse_shapes(posterior: Posterior) -> None:
    """Refuse latents with fewer dimensions than numbers: a Jacobian in those numbers has no determinant."""
    for path, entry in leaves_of(posterior.latent_sites()):
        support = entry.site.support
        if support is None or support.is_discrete or support.event_dim == 0:
            continue
        shape = entry.site.shape
        if np.prod(dist.biject_to(support).inverse_shape(shape)) != np.prod(shape):
            raise SupportError(
                f"change: {path!r} at {entry.site.where} has the support {support}, of fewer dimensions than numbers, which a "
                "transform cannot move. Move it without a transform, or write the model with unconstrained latents."
            )


def _tolerance() -> float:
    return 1e-8 if jnp.result_type(float) == jnp.float64 else 1e-3


class _Move:
    """One particle's move, its weight, and how far its inverse leads astray."""

    def __init__(self, before: Posterior, after: Posterior, forward: Any, backward: Any, transform: Any, inverse: Any):
        self.before, self.after, self.forward, self.backward = before, after, forward, backward
        self.transform, self.inverse = transform, inverse

    def run(self, z: Choices) -> tuple[Choices, Any, dict[str, Any]]:
        k, log_k = self._drawn(z)
        if self.transform is None:
            (new, back), log_jacobian = self._swapped(z, k), 0.0
            start = (z, k)
        else:
            (new, back), log_jacobian = _with_jacobian(self.transform, z, k)
            start = (z, k) if self.inverse is None else self.inverse(new, back)
        log_l = self._undone(new, back)
        there = self.after.log_density_inside(new) + log_l - log_k + log_jacobian
        weight = log_ratio(there, self.before.log_density_inside(z))
        return new, weight, _differences((z, k), start)

    def _drawn(self, z: Choices) -> tuple[Choices, Any]:
        if self.forward is None:
            return {}, 0.0
        program = bound_program(self.forward(z), "the forward program")
        check_drawn(program.table(), "the forward program")
        outcome = program.rebind()
        return outcome.choices, outcome.log_density

    def _undone(self, new: Choices, back: Choices) -> Any:
        if self.backward is None:
            if extra := [path for path, _ in leaves_of(back)]:
                raise AddressError(
                    f"change: the move leaves {', '.join(map(repr, extra))} behind, which a backward program must draw."
                )
            return 0.0
        program = bound_program(self.backward(new), "the backward program")
        check_drawn(program.table(), "the backward program")
        sites, given = {p for p, _ in leaves_of(program.sites())}, {p for p, _ in leaves_of(back)}
        if sites != given:
            raise AddressError(
                f"change: the backward program draws {', '.join(sorted(sites)) or 'nothing'}, but what it must undo is "
                f"{', '.join(sorted(given)) or 'nothing'}."
            )
        return program.assess_inside(back)[0]

    def _swapped(self, z: Choices, k: Choices) -> tuple[Choices, Choices]:
        """Put what was drawn in the place of the old latents, which are left behind."""
        old, drawn = dict(leaves_of(z)), dict(leaves_of(k))
        wanted = [path for path, _ in leaves_of(self.after.latent_sites())]
        if unused := [path for path in drawn if path not in wanted]:
            raise AddressError(
                f"change: the forward program draws {unused[0]!r}, which is no latent of the new target: give a transform."
            )
        if missing := [path for path in wanted if path not in drawn and path not in old]:
            raise AddressError(
                f"change: the new target's latent {missing[0]!r} is neither an old one nor drawn by the forward program."
            )
        new = nested((path, drawn.get(path, old.get(path))) for path in wanted)
        back = nested((path, x) for path, x in old.items() if path in drawn or path not in wanted)
        return new, back


def _with_jacobian(transform: Transform, z: Choices, k: Choices) -> tuple[tuple[Choices, Choices], Any]:
    """Apply a transform; return also the log of the absolute determinant of its continuous part's Jacobian."""
    pair = _arrays(z), _arrays(k)
    leaves, structure = jax.tree.flatten(pair)
    moving = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    vector, unravel = ravel_pytree([x for x, yes in zip(leaves, moving, strict=True) if yes])

    def flat(vector: Any) -> tuple[Any, Any]:
        own = iter(unravel(vector))
        given = [next(own) if yes else x for x, yes in zip(leaves, moving, strict=True)]
        after = transform(*jax.tree.unflatten(structure, given))
        if not (isinstance(after, tuple) and len(after) == 2):
            raise TypeError(f"change at {_jax.caller()}: the transform must return (new latents, l), got {after!r}.")
        after = tuple(map(_arrays, after))
        found = [x for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return ravel_pytree(found)[0], after

    if not any(moving):
        return flat(vector)[1], 0.0
    jacobian, after = jax.jacfwd(flat, has_aux=True)(vector)
    if jacobian.shape[0] != jacobian.shape[1]:
        raise ShapeError(
            f"change: the transform takes {jacobian.shape[1]} continuous numbers to {jacobian.shape[0]}. A bijection keeps "
            "their number: draw what is missing in the forward program, or leave what is too much to the backward one."
        )
    return after, jnp.linalg.slogdet(jacobian)[1]


def _arrays(tree: Choices) -> Choices:
    return jax.tree.map(jnp.asarray, tree)


def _differences(before: tuple[Choices, Choices], after: tuple[Choices, Choices]) -> dict[str, Any]:
    """Return how far each latent and each auxiliary choice is from what it was, relative to its size."""
    found = {}
    for old, new in zip(before, after, strict=True):
        olds, news = dict(leaves_of(old)), dict(leaves_of(new))
        if set(olds) != set(news):
            raise AddressError(
                f"change: the inverse gives {', '.join(sorted(news)) or 'nothing'} for {', '.join(sorted(olds)) or 'nothing'}."
            )
        for path, x in olds.items():
            if jnp.shape(x) != jnp.shape(news[path]):
                raise ShapeError(
                    f"change: the inverse gives {path!r} the shape {jnp.shape(news[path])}, not {jnp.shape(x)}."
                )
            found[path] = jnp.abs(jnp.asarray(news[path]) - x) / (1.0 + jnp.abs(x))
    return found
