r"""A test of a user's own algorithm: do its draws and its scores obey one contract?"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from expectax.ppl import Posterior, Program, _jax
from expectax.ppl._compile import compiled
from expectax.ppl._match import check_guide
from expectax.ppl._nested import Choices, leaves_of
from expectax.ppl._program import bound_program
from expectax.ppl._staging import check_key

_LEVELS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
_FEWEST = 50
"""Fewer events, or weights that are worth fewer, have no normal mean."""


class JointIdentity(NamedTuple):
    """The result of `check_joint_identity`.

    Example: see `vi.check_joint_identity`.

    Attributes:
        p_value: of all comparisons together (Bonferroni); below 1e-6 the algorithm is wrong.
        worst: what was compared where the two sides differ most.
        z_scores: difference over its standard error, by what was compared.
    """

    p_value: float
    worst: str
    z_scores: dict[str, float]


def check_joint_identity(
    program: Program, reference: Program, key: PRNGKeyArray, num_samples: int = 10_000
) -> JointIdentity:
    r"""Test that a program with an estimated density draws and scores under one contract.

    Drawing gives $(x, w)$, scoring gives $w$ for an $x$; for every $g \ge 0$ it must hold that
    $E_{\text{draw}}[g(x, w)] = \int E_{\text{score}(x)}[e^w g(x, w)]\, dx$. The right side is an expectation under
    a reference $h$ with an exact density. With $v = w - \log h(x)$ the functions compared are
    $g = 1\{v < c\}$ and $g = e^{-v} 1\{v \ge c\}$, alone and for $x$ below a quantile of each choice: both sides are
    bounded, so that the z-scores can be trusted.

    Args:
        program: `vi.marginal(...)` or `vi.normalize(...)` with the algorithm under test.
        reference: a bound program with the same choices and an exact density, of which draws are cheap; the nearer to
            `program`, the stronger the test.
        key: a typed key.
        num_samples: draws of either side. The test's power grows with their square root.

    Returns:
        A `JointIdentity`.

    Raises:
        AddressError, ShapeError, SupportError: the reference's choices are not those of the program.
        ValueError: the two are too far apart for any comparison.

    Source: Lew et al. 2023, Definition 3.2 (strong form); the bounded pair of test functions is ours.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def chain():
        ...     u = ex.sample("u", dist.Normal(0.0, 1.0))
        ...     ex.sample("x", dist.Normal(u, 1.0))
        >>> @ex.model
        ... def wide():
        ...     ex.sample("x", dist.Normal(0.0, 2.0))
        >>> marginal = vi.marginal(chain(), "x", vi.sir(3))
        >>> vi.check_joint_identity(marginal, wide(), jax.random.key(0)).p_value > 1e-6
        True
    """
    check_key(key)
    bound_program(program, "vi.check_joint_identity")
    check_guide(
        bound_program(reference, "vi.check_joint_identity"), Posterior(program, {}), _jax.caller(), covering=True
    )
    if num_samples < 100:
        raise ValueError(f"check_joint_identity needs num_samples >= 100, got {num_samples}.")
    drawn, scored = jax.device_get(_both(program, reference, key, num_samples))
    z_scores = _compared(*drawn, *scored)
    if not z_scores:
        raise ValueError(
            "check_joint_identity: the reference and the program have nothing in common, or too few samples. Choose a "
            "reference that is nearer to the program, or raise num_samples."
        )
    worst = max(z_scores, key=lambda name: abs(z_scores[name]))
    log_p = jnp.log(2.0) + jax.scipy.stats.norm.logcdf(-abs(z_scores[worst]))
    return JointIdentity(min(1.0, len(z_scores) * float(jnp.exp(log_p))), worst, z_scores)


@compiled
def _both(program: Program, reference: Program, key: Any, num_samples: int) -> Any:
    """Return `(choices, v)` of draws of the program, and of the reference as the program scores them."""

    def draw(key: Any) -> tuple[Choices, Any]:
        trace = program.simulate(key)
        return trace.choices, trace.log_density - reference.assess(trace.choices)[0]

    def score(key: Any) -> tuple[Choices, Any]:
        key_draw, key_score = jax.random.split(key)
        trace = reference.simulate(key_draw)
        return trace.choices, program.assess(trace.choices, key=key_score)[0] - trace.log_density

    keys = jax.random.split(key)
    return tuple(_jax.over_lanes(side, num_samples)(k) for side, k in zip((draw, score), keys, strict=True))


def _compared(drawn: Choices, v_drawn: Any, scored: Choices, v_scored: Any) -> dict[str, float]:
    """Return the z-score of every comparison."""
    regions = {"": (np.ones(len(v_drawn), bool), np.ones(len(v_scored), bool))}
    columns = dict(leaves_of(scored))
    for path, value in leaves_of(drawn):
        a, b = (np.reshape(x, (len(x), -1))[:, 0] for x in (value, columns[path]))
        cut = np.median(np.concatenate([a, b]))
        regions[f" and {path} below {cut:.3g}"] = (a < cut, b < cut)
    found = {}
    for c in np.unique(np.quantile(np.concatenate([v_drawn, v_scored]), _LEVELS)):
        for name, (a, b) in regions.items():
            low = _z(v_drawn, (v_drawn < c) & a, v_scored, (v_scored < c) & b)
            high = _z(-v_scored, (v_scored >= c) & b, -v_drawn, (v_drawn >= c) & a)
            found |= {
                f"weight {side} {c:.3g}{name}": z for side, z in (("below", low), ("above", high)) if z is not None
            }
    return found


def _z(v_counted: Any, counted: Any, v_weighed: Any, weighed: Any) -> float | None:
    """Compare the rate of an event on one side with the sum of weights on the other, None where events are too few.

    The weights' second moment is, by the identity itself, a mean over the counted side: of the two estimates the larger
    one is taken, since a sample without the rare large weights does not know its own variance.
    """
    n, m = len(counted), len(weighed)
    with np.errstate(over="ignore"):
        weights = np.where(weighed, np.exp(np.where(weighed, v_weighed, 0.0)), 0.0)
        crossed = np.where(counted, np.exp(np.where(counted, v_counted, 0.0)), 0.0)
    rate, total = counted.mean(), weights.mean()
    likely = max(rate, total)
    second = max(np.mean(weights**2), crossed.mean())
    if n * min(likely, 1.0) < _FEWEST or second == 0.0 or m * likely**2 / second < _FEWEST:
        return None
    variance = likely * max(1.0 - likely, 0.0) / n + max(second - min(rate, total) ** 2, 0.0) / m
    return float((rate - total) / np.sqrt(max(variance, 1e-12)))
