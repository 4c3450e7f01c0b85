r"""`marginal` and `normalize`: programs whose density is estimated by an algorithm, under one contract.

Both make choices with weights such that the joint identity of `ppl/_stochastic` holds; from it follow
$E[e^{w} \mid x] = p(x)$ when a density is estimated and $E[e^{-w} \mid x] = 1/p(x)$ when it comes with a draw, so that
every bound that uses draws for guides and estimates for models stays a lower bound (Jensen).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from expectax.ppl import AddressError, ControlFlowError, Posterior, Program, _jax, model
from expectax.ppl._match import check_drawn
from expectax.ppl._nested import Choices, leaves_of, nested
from expectax.ppl._program import bound_program
from expectax.ppl._selection import chosen_by
from expectax.ppl._staging import stage, staging_once
from expectax.ppl._stochastic import bind_stochastic
from expectax.ppl._table import Entry, choices_of

from ._algorithm import Algorithm, check_algorithm, evidence
from ._exact import Exact
from ._objective import log_density, simulate


def marginal(program: Program, keep: Any, algorithm: Algorithm | None = None) -> Program:
    r"""Keep some choices of a program and integrate the others out: $p(x) = \int p(x, u)\, du$, estimated.

    It is a program like any other: a guide, a model, a site of either (`expectax.sample("z", vi.marginal(...))`), also
    inside another marginal. Its return value is the nested dict of the kept choices.

    With the algorithm's estimates $\hat Z$ of the evidence of $u \mapsto p(x, u)$: scoring $x$ gives $\log \hat Z$;
    simulating draws $(x, u) \sim p$ and gives $\log \hat Z$ of a run that is conditioned to return $u$.

    Args:
        program: a bound program.
        keep: the choices to keep: an address, several, or a `Selection` without indices.
        algorithm: how to integrate: `vi.sir(n, proposal)`, `vi.exact()`, `vi.smc(...)`, `vi.mcmc(...)`, or any
            `vi.Algorithm`; exact enumeration by default.

    Returns:
        A bound program. Without `vi.exact()` its density is random, so that `assess` takes a key and `Trace.log_density`
        is one estimate; an objective gets unbiased gradients all the same.

    Raises:
        AddressError: `keep` is unknown, or is everything or nothing.
        ControlFlowError: a kept choice stands in a branch, or is kept by index; or the program observes something by
            itself (`observe`, `factor`, `condition`), so that running it does not draw from its density: normalise it.
        TypeError: `algorithm` is none.

    Sources: Becker et al., PLDI 2024 (section 4); Ranganath et al. 2016 (hierarchical guides); Lew et al. 2022 (RAVI).

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def target():
        ...     ex.sample("x", dist.Normal(0.0, 2.0**0.5))
        >>> @ex.model
        ... def hierarchical(scale):
        ...     u = ex.sample("u", dist.Normal(0.0, 1.0))
        ...     ex.sample("x", dist.Normal(u, scale))
        >>> bound = vi.elbo(target().given({}), lambda s: vi.marginal(hierarchical(s), "x", vi.sir(50)))
        >>> bool(abs(vi.estimate(bound, 1.0, jax.random.key(0)).mean) < 0.05)  # the evidence is 1
        True
    """
    algorithm = check_algorithm(Exact() if algorithm is None else algorithm, "vi.marginal")
    table = bound_program(program, "vi.marginal").table()
    check_drawn(table, "vi.marginal")
    sites = choices_of(table)
    chosen = chosen_by(keep, sites, "vi.marginal")
    kept = {path: entry for path, entry in leaves_of(sites) if chosen[path] is not False}
    for path in kept:
        if chosen[path] is not True:
            raise ControlFlowError(
                f"vi.marginal at {_jax.caller()}: {path!r} is kept as a whole or not, never by index."
            )
    if not kept or len(kept) == len(chosen):
        raise AddressError(
            f"vi.marginal at {_jax.caller()}: keep is {'no choice' if not kept else 'every choice'} of {program!r}; the "
            f"choices are {', '.join(map(repr, chosen))}."
        )
    return _marginal(program, algorithm, tuple(kept))


@model
def _marginal(program: Program, algorithm: Algorithm, kept: tuple[str, ...]) -> Choices:
    part = lambda choices, wanted: nested((p, x) for p, x in leaves_of(choices) if (p in kept) == wanted)  # noqa: E731

    def draw() -> tuple[Choices, Any]:
        choices, log_p = simulate(program)
        x, u = part(choices, True), part(choices, False)
        return x, algorithm.conditional(Posterior(program, x), u, log_p)

    def estimate(x: Choices) -> Any:
        return evidence(algorithm, Posterior(program, x))

    with staging_once():
        return bind_stochastic(draw, estimate, _entries(stage(program).sites, kept, "vi.marginal"))


def normalize(posterior: Posterior, algorithm: Algorithm) -> Program:
    r"""Turn an unnormalised target into a distribution: what an algorithm returns, with its estimated density.

    It is a program over the latents, that can be a guide, a proposal, or a site. With the algorithm's run
    $(z, \hat Z)$ the density of $z$ is estimated by $\gamma(z) / \hat Z$; to score a given $z$ the algorithm runs
    conditioned to return it. As $\hat Z \to Z$ it becomes the exact posterior.

    Args:
        posterior: the target, `program.given(observations)`.
        algorithm: `vi.sir(n, proposal)`, `vi.smc(...)`, `vi.mcmc(...)`, `vi.exact()`, or any `vi.Algorithm`.

    Returns:
        A bound program; its return value is the nested dict of the latents.

    Raises:
        ControlFlowError: a latent stands in a branch, or the target has missing data.
        TypeError: `algorithm` or `posterior` is none.

    Sources: Becker et al., PLDI 2024 (section 4); Lew et al. 2022 (RAVI); Andrieu, Doucet and Holenstein 2010.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def normal():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> approximation = vi.normalize(normal().given({"y": 1.0}), vi.sir(100))
        >>> draws = jax.vmap(approximation.simulate)(jax.random.split(jax.random.key(0), 1000))
        >>> bool(abs(draws["z"].mean() - 0.5) < 0.1)
        True
    """
    check_algorithm(algorithm, "vi.normalize")
    if not isinstance(posterior, Posterior):
        raise TypeError(f"vi.normalize takes a posterior, program.given(observations), got {posterior!r}.")
    return _normalized(posterior, algorithm)


@model
def _normalized(posterior: Posterior, algorithm: Algorithm) -> Choices:
    def draw() -> tuple[Choices, Any]:
        run = algorithm.run(posterior)
        # where all that the run saw is impossible its evidence is 0, and so is 1 / density
        log_weight = jnp.where(run.log_evidence == -jnp.inf, jnp.inf, run.log_density - run.log_evidence)
        return run.latents, log_weight

    def estimate(z: Choices) -> Any:
        log_gamma = log_density(posterior, z)
        possible = jnp.where(log_gamma == -jnp.inf, 0.0, algorithm.conditional(posterior, z, log_gamma))
        return log_gamma - possible

    with staging_once():
        sites = posterior.latent_sites()
        return bind_stochastic(draw, estimate, _entries(sites, [path for path, _ in leaves_of(sites)], "vi.normalize"))


def _entries(sites: Choices, paths: Any, what: str) -> dict[str, Entry]:
    found = {path: entry for path, entry in leaves_of(sites) if path in paths}
    for path, entry in found.items():
        if entry.conditional or entry.missing is not None:
            raise ControlFlowError(
                f"{what}: {path!r} at {entry.site.where} stands in a branch, has a mask, or is observed in part: it has "
                "no density that can be estimated as a whole. Integrate it out, or observe it."
            )
    return found
