r"""The noisy cone: a posterior on a ring, which no normal guide fits, and a guide with an auxiliary angle, which does.

Source: Becker et al., Probabilistic Programming with Programmable Variational Inference, PLDI 2024, figure 2 and
table 4.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from numpyro import distributions as dist

from expectax.ppl import Posterior, model, sample

CONE_HEIGHT = 5.0
"""The height that is observed."""

CONE_LOG_EVIDENCE = -5.3232
r"""$\log p(z = 5)$, by quadrature; no bound may be above it."""


@model
def cone() -> None:
    r"""A point of the plane and its noisy height: $x, y \sim N(0, 10)$, $z \sim N(r, 0.1 + r / 100)$, $r = x^2 + y^2$.

    Sites: `x`, `y`, `z`, all scalars.

    Source: Becker et al. 2024, figure 2.

    Example:
        >>> import jax
        >>> from expectax.models import cone
        >>> sorted(cone().simulate(jax.random.key(0)).choices)
        ['x', 'y', 'z']
    """
    x = sample("x", dist.Normal(0.0, 10.0))
    y = sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    sample("z", dist.Normal(r, 0.1 + r / 100.0))


def cone_posterior() -> Posterior:
    r"""Return the cone given its height: a ring of radius $\sqrt 5$.

    Example:
        >>> from expectax.models import cone_posterior
        >>> round(float(cone_posterior().log_density({"x": 2.0, "y": 1.0})), 3)
        -5.49
    """
    return cone().given({"z": CONE_HEIGHT})


@model
def cone_guide(params: dict[str, Any]) -> None:
    """A mean-field guide: two independent normals, which cover one arc of the ring.

    Args:
        params: `{"mean": (2,), "log_scale": (2,)}`, see `cone_start`.

    Source: Becker et al. 2024, figure 2.

    Example:
        >>> import jax
        >>> from expectax.models import cone_guide, cone_start
        >>> sorted(cone_guide(cone_start()).simulate(jax.random.key(0)).choices)
        ['x', 'y']
    """
    scale = jnp.exp(params["log_scale"])
    sample("x", dist.Normal(params["mean"][0], scale[0]))
    sample("y", dist.Normal(params["mean"][1], scale[1]))


@model
def ring_guide(params: dict[str, Any]) -> None:
    r"""A guide with an auxiliary choice: $u \sim U(0, 1)$ is a turn of the ring, and $x, y$ are normal around it.

    The density of $x, y$ alone is an integral over `u`: to be used with `vi.hvi`, `vi.iwhvi` or `vi.diwhvi`.

    Args:
        params: `{"log_scale": (2,)}`, see `ring_start`.

    Source: Becker et al. 2024, figure 2.

    Example:
        >>> import jax
        >>> from expectax.models import ring_guide, ring_start
        >>> sorted(ring_guide(ring_start()).simulate(jax.random.key(0)).choices)
        ['u', 'x', 'y']
    """
    u = sample("u", dist.Uniform(0.0, 1.0))
    angle, radius, scale = 2 * jnp.pi * u, CONE_HEIGHT**0.5, jnp.exp(params["log_scale"])
    sample("x", dist.Normal(radius * jnp.cos(angle), scale[0]))
    sample("y", dist.Normal(radius * jnp.sin(angle), scale[1]))


def cone_start(x: float = 0.0) -> dict[str, Any]:
    """Return initial parameters of `cone_guide`, with its mean at `(x, 0)`; the IWELBO's start is at `x = 3`.

    Example:
        >>> from expectax.models import cone_start
        >>> float(cone_start(3.0)["mean"][0])
        3.0
    """
    return {"mean": jnp.array([x, 0.0]), "log_scale": jnp.array([1.0, 1.0])}


def ring_start() -> dict[str, Any]:
    """Return initial parameters of `ring_guide`.

    Example:
        >>> from expectax.models import ring_start
        >>> ring_start()["log_scale"].shape
        (2,)
    """
    return {"log_scale": jnp.zeros(2)}
