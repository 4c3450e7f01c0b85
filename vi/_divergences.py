"""Bounds and divergences other than the ELBO's: Rényi, chi-square, and the forward Kullback-Leibler divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from expectax.ppl import AddressError, Program, Selection, _jax
from expectax.ppl._match import check_drawn, check_guide
from expectax.ppl._nested import leaves_of, nested
from expectax.ppl._selection import chosen_by

from ._objective import Objective, log_density, simulate
from ._shared import Guide, Target, check_particles, check_target, log_mean_exp, log_weights, matched, still

AmortisedGuide = Callable[[Any, Any], Program]


def renyi(posterior: Target, guide: Guide, num_particles: int, alpha: float) -> Objective:
    r"""The variational Rényi bound $\frac{1}{1-\alpha} \log \frac1n \sum_{i=1}^n w_i^{1-\alpha}$, in expectation.

    $w_i = p(z_i, y) / q_\phi(z_i)$ with $z_i \sim q_\phi$. At $\alpha = 0$ it is the IWELBO; as $\alpha \to 1$ it goes
    to the ELBO, which $\alpha = 1$ is exactly. It falls as $\alpha$ grows: $0 \le \alpha < 1$ seeks to cover the
    posterior, $\alpha > 1$ seeks a mode. For $\alpha \ge 0$ it is at most $\log p(y)$; for $\alpha < 0$ and enough
    particles it is above, see `chi_square`.

    Value and gradient are unbiased for this expectation. As an estimate of Rényi's own bound (the limit of many
    particles) it is consistent, and too low for $\alpha < 1$, too high for $\alpha > 1$.

    Args:
        posterior: the target, or a function of the parameters that returns it.
        guide: a model of the parameters, with exactly the posterior's latents as sites.
        num_particles: $n$, at least 1.
        alpha: any finite number, fixed.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 1, or `alpha` is not finite.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Li and Turner 2016, Rényi divergence variational inference.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(mean):
        ...     ex.sample("z", dist.Normal(mean, 0.5**0.5))
        >>> bound = vi.renyi(model().given({"y": 1.0}), guide, num_particles=8, alpha=0.5)
        >>> round(float(vi.estimate(bound, 0.5, jax.random.key(0)).mean), 3)  # tight: the guide is the posterior
        -1.516
    """
    check_target(posterior)
    check_particles("renyi", num_particles)
    if not math.isfinite(alpha):
        raise ValueError(f"renyi needs a finite alpha, got {alpha}.")
    return Objective(_renyi, (posterior, guide, num_particles, float(alpha)))


def _renyi(posterior: Target, guide: Guide, num_particles: int, alpha: float, params: Any) -> Any:
    target = matched(posterior, guide, params)
    weights = log_weights(target, guide(params), num_particles)
    if alpha == 1:
        return jnp.mean(weights)
    return log_mean_exp((1 - alpha) * weights) / (1 - alpha)


def chi_square(posterior: Target, guide: Guide, num_particles: int, order: float = 2.0) -> Objective:
    r"""Minus the chi-square upper bound, $-\frac1r \log \frac1n \sum_{i=1}^n w_i^r$, in expectation.

    $w_i = p(z_i, y) / q_\phi(z_i)$ with $z_i \sim q_\phi$, and $r$ the order. The bound is
    $\frac1r \log E_q[w^r] \ge \log p(y)$ and is to be *minimised*; as every objective is maximised, this returns it with
    a minus sign: `-vi.estimate(...).mean` estimates the upper bound. It is minus the Rényi bound at $\alpha = 1 - r$.

    Value and gradient are unbiased for the expectation above, which is consistent for the bound but nearer to zero than
    it: by Jensen's inequality the estimate of the upper bound is too low, with few particles even below $\log p(y)$.
    Then a fit can run away from the posterior: use many particles, and start from a guide fitted by the ELBO.

    Args:
        posterior: the target, or a function of the parameters that returns it (only the guide's parameters should be
            fitted: an upper bound on the evidence says nothing about how to learn a model).
        guide: a model of the parameters, with exactly the posterior's latents as sites and heavier tails.
        num_particles: $n$, at least 2.
        order: $r \ge 1$; 2 is the chi-square divergence.

    Returns:
        An objective to maximise over `params`.

    Raises:
        ValueError: `num_particles` is less than 2, or `order` is less than 1 or not finite.
        AddressError, ShapeError, SupportError: at first use, if the guide does not fit the posterior.

    Source: Dieng et al. 2017, Variational inference via chi upper bound minimization (CUBO).

    Example: see `vi.renyi`, with `vi.chi_square(posterior, guide, 100)` in its place.
    """
    check_target(posterior)
    check_particles("chi_square", num_particles, 2)
    if not 1 <= order < math.inf:
        raise ValueError(f"chi_square needs a finite order >= 1, got {order}.")
    return Objective(_chi_square, (posterior, guide, num_particles, float(order)))


def _chi_square(posterior: Target, guide: Guide, num_particles: int, order: float, params: Any) -> Any:
    return -_renyi(posterior, guide, num_particles, 1 - order, params)


def forward_kl(
    program: Program | Callable[[Any], Program], guide: AmortisedGuide, observed: str | Selection
) -> Objective:
    r"""Train an amortised guide on simulated data: $E_{(z, y) \sim p}[\log q_\phi(z \mid y)]$.

    Up to a constant this is $-E_{p(y)}\, KL(p(z \mid y) \,\|\, q_\phi(z \mid y))$, so that the best guide is the
    posterior of every data set at once; no data set is needed. It is the sleep phase of wake-sleep, and inference
    compilation. The gradient is that of $\log q_\phi$ alone and needs no derivative through a choice, whatever the
    model's and the guide's sites are.

    Args:
        program: the bound model, without observations; or, where it is learned by another objective, a function of
            the parameters that returns it. It is simulated at stopped parameters.
        guide: a model of `(params, observations)`, with exactly the program's other choices as sites; `observations`
            is the nested dict of simulated data.
        observed: which of the program's choices are data: an address or a selection.

    Returns:
        An objective to maximise over `params`.

    Raises:
        AddressError: at first use, if nothing is observed, or the guide's sites are not the other choices.
        ShapeError, SupportError: at first use, if the guide does not fit the program.
        ControlFlowError: at first use, if the program observes data of its own or has factors: it cannot be simulated.

    Source: Hinton et al. 1995 (the sleep phase); Le, Baydin and Wood 2017 (inference compilation).

    Example:
        >>> import jax, jax.numpy as jnp, optax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def model():
        ...     z = ex.sample("z", dist.Normal(0.0, 1.0))
        ...     ex.sample("y", dist.Normal(z, 1.0))
        >>> @ex.model
        ... def guide(slope, observations):
        ...     ex.sample("z", dist.Normal(slope * observations["y"], 0.5**0.5))
        >>> sleep = vi.forward_kl(model(), guide, "y")
        >>> fit = vi.fit(sleep, 0.0, optax.adam(0.02), key=jax.random.key(0), num_steps=300, num_samples=64)
        >>> bool(abs(fit.params - 0.5) < 0.05)  # the posterior's mean is y / 2
        True
    """
    if not isinstance(program, Program) and not callable(program):
        raise TypeError(f"forward_kl takes a bound model, or a function that returns one, got {program!r}.")
    return Objective(_forward_kl, (program, guide, observed))


def _forward_kl(program: Any, guide: AmortisedGuide, observed: str | Selection, params: Any) -> Any:
    program = program if isinstance(program, Program) else program(still(params))
    check_drawn(program.table(), "forward_kl")
    choices, _ = simulate(program)
    observations = _part(choices, chosen_by(observed, program.sites(), "forward_kl"))
    posterior = program.given(observations)
    check_guide(guide(params, observations), posterior, _jax.caller())
    return log_density(guide(params, observations), posterior.latents(choices))


def _part(choices: Any, chosen: dict[str, Any]) -> Any:
    """Return the chosen part of some choices; sites are chosen as a whole."""
    if any(wanted is not True and wanted is not False for wanted in chosen.values()) or not any(chosen.values()):
        raise AddressError(f"forward_kl at {_jax.caller()}: `observed` must choose some sites, each as a whole.")
    return nested((path, value) for path, value in leaves_of(choices) if chosen[path])
