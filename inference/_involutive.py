r"""Involutive MCMC: one deterministic map that is its own inverse, on latents and auxiliary choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist

from expectax.ppl import Program, ShapeError, SupportError
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._program import bound_program

from ._accept import accepted, check_exact_density, chosen
from ._kernel import Adaptation, Info, State
from ._metropolis import check_made
from ._target import Target

Involution = Callable[[Choices, Choices], tuple[Choices, Choices]]


class Involutive(eqx.Module):
    """An involutive kernel; made by `involutive`. Example: see `involutive`."""

    proposal: Callable[[Choices], Program] = eqx.field(static=True)
    involution: Involution = eqx.field(static=True)
    check: bool = eqx.field(static=True)
    name: str = eqx.field(static=True, default="involutive")

    def init(self, target: Target, latents: Choices) -> State:
        """Return the latents and their density."""
        check_exact_density(target, self.name)
        _check_dimensions(target.posterior.latent_sites())
        return State(latents, target.log_density(latents))

    def step(self, target: Target, state: State, parameters: Any) -> tuple[State, Info]:
        """Draw the auxiliary choices, map, and accept or stay."""
        del parameters
        drawn = self._program(state.position).rebind()
        here = (state.position, drawn.choices)
        there, log_jacobian = mapped(self.involution, here)
        if self.check:
            there = _checked(self.involution, here, there)
        latents, auxiliary = there
        log_backward, _ = self._program(latents).assess_inside(auxiliary)
        proposed = State(latents, target.log_density(latents))
        ratio = proposed.log_density - state.log_density + log_backward - drawn.log_density + log_jacobian
        go, probability = accepted(ratio)
        after = chosen(go, proposed, state)
        return after, Info(probability, energy=-after.log_density)

    def _program(self, latents: Choices) -> Program:
        program = bound_program(self.proposal(latents), "involutive's proposal")
        for path, entry in leaves_of(program.sites()):
            check_made(entry, path, "involutive")
        _check_dimensions(program.sites())
        return program

    def latents(self, target: Target, position: Any) -> Choices:
        """Return the latents."""
        del target
        return position

    def adaptation(self, target: Target, state: State) -> Adaptation:
        """Tune nothing."""
        del target, state
        return Adaptation.none()


def mapped(involution: Involution, here: Any) -> tuple[Any, Any]:
    r"""Return the image of latents and auxiliary choices, and $\log|\det J|$ over their continuous parts."""
    continuous, discrete = eqx.partition(here, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(continuous)

    def run(vector: Any) -> tuple[Any, Any]:
        there = involution(*eqx.combine(unravel(vector), discrete))
        there = jax.tree.map(jnp.asarray, there)
        _check_alike(here, there)
        return ravel_pytree(eqx.filter(there, eqx.is_inexact_array))[0], there

    jacobian, there = jax.jacfwd(run, has_aux=True)(vector)
    return there, jnp.linalg.slogdet(jacobian)[1] if vector.size else jnp.zeros(())


def _check_alike(here: Any, there: Any) -> None:
    """Refuse an image with other addresses, shapes or dtypes."""
    if not (isinstance(there, tuple) and len(there) == 2):
        raise ShapeError(f"involutive: the involution returns a pair (latents, auxiliary), got {type(there).__name__}.")
    for what, old, new in zip(("latents", "auxiliary choices"), here, there, strict=True):
        before, after = ({p: (jnp.shape(v), jnp.result_type(v)) for p, v in leaves_of(tree)} for tree in (old, new))
        if before != after:
            different = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
            shown = "; ".join(f"{p!r}: {_shown(before.get(p))} became {_shown(after.get(p))}" for p in different)
            raise ShapeError(
                f"involutive: the involution must keep the addresses, shapes and dtypes of the {what}, but {shown}. Return "
                "everything that it got; what it does not move it passes on."
            )


def _shown(kind: Any) -> str:
    return "nothing" if kind is None else f"{kind[1]}{list(kind[0])}"


def _checked(involution: Involution, here: Any, there: Any) -> Any:
    """Return the image if the map leads back; fail at run time if not."""
    again = involution(*there)
    precision = jnp.finfo(jnp.result_type(float)).eps ** 0.5

    def apart(a: Any, b: Any) -> Any:
        a, b = jnp.asarray(a), jnp.asarray(b)
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            return jnp.any(a != b)
        return jnp.any(~(jnp.abs(a - b) <= precision * (1 + jnp.abs(a))))  # also where either is nan

    wrong = jnp.stack(jax.tree.leaves(jax.tree.map(apart, here, tuple(again)))).any()
    message = (
        "involutive: the involution is not its own inverse: applied twice it does not lead back to where it started."
    )
    return eqx.error_if(there, wrong, message)


def _check_dimensions(sites: Choices) -> None:
    """Refuse a site whose values fill no space of their own dimension: it has no Jacobian."""
    for path, entry in leaves_of(sites):
        support, shape = entry.site.support, entry.site.shape
        if support is None or support.is_discrete:
            continue
        try:
            free = dist.biject_to(support).inverse_shape(shape)
        except NotImplementedError:
            continue
        if free != shape:
            raise SupportError(
                f"involutive: the values of {path!r} at {entry.site.where} have {shape} numbers, of which {free} are free, so "
                f"that a map of them has no Jacobian. Move the others: inference.on(~ex.select({path!r}), ...)."
            )


def involutive(proposal: Callable[[Choices], Program], involution: Involution, *, check: bool = False) -> Involutive:
    r"""Involutive MCMC: a map of latents and auxiliary choices that is its own inverse.

    Auxiliary choices $u \sim q(\cdot \mid z)$ are drawn, $(z', u') = f(z, u)$ with $f = f^{-1}$, and $z'$ is accepted with
    probability

    $$\min\Big(1, \frac{\gamma(z')\, q(u' \mid z')}{\gamma(z)\, q(u \mid z)} \Big|\det \frac{\partial f(z, u)}{\partial (z, u)}
    \Big|\Big).$$

    The Jacobian is taken by automatic differentiation over the continuous choices, in their own space; discrete ones pass
    through. With a model's index among the latents, and parameters padded to one size, this is reversible jump.

    Args:
        proposal: `proposal(latents)` returns the bound program of the auxiliary choices; its addresses are its own.
        involution: `involution(latents, auxiliary)` returns the new pair, with the same addresses, shapes and dtypes.
        check: verify at run time that the map leads back, to half the digits; fails with equinox's run-time error. Slow.

    Returns:
        A `Kernel` for `mcmc` and for the combinators.

    Raises:
        TypeError: the proposal returns no bound program.
        ShapeError: the involution changes an address, a shape or a dtype.
        SupportError: a choice lives on a surface, such as a simplex.
        ControlFlowError: an auxiliary choice is not always drawn.
        DistributionError: the target's density is only estimated.

    Sources: Green 1995; Neklyudov et al. 2020; Cusumano-Towner, Lew and Mansinghka 2020.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, inference
        >>> @ex.model
        ... def model():
        ...     ex.sample("scale", dist.Gamma(3.0, 1.0))
        >>> @ex.model
        ... def proposal(z):
        ...     ex.sample("factor", dist.LogNormal(0.0, 1.0))
        >>> def stretch(z, u):
        ...     return {"scale": z["scale"] * u["factor"]}, {"factor": 1 / u["factor"]}
        >>> kernel = inference.involutive(proposal, stretch)
        >>> chains = inference.mcmc(model().given({}), kernel, key=jax.random.key(0), num_warmup=100, num_samples=2000)
        >>> bool(abs(chains.mean()["scale"] - 3.0) < 0.3)
        True
    """
    for what, function in (("proposal", proposal), ("involution", involution)):
        if not callable(function):
            raise TypeError(f"involutive: the {what} is a function of the latents, got {function!r}.")
    return Involutive(proposal, involution, check)
