"""Models for the tests of defects that were found in other languages."""

import numpy as np
from jax import lax

import expectax as ex
from expectax import dist

PRIOR, Y = np.array([0.7, 0.3]), 1.75
EFFECT = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
ERROR = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])


@ex.model
def flip():
    """Its posterior P(z = 1 | y) is 0.3 N(y; 2, 1) over the sum, 0.658 at y = 1.75."""
    z = ex.sample("z", dist.Bernoulli(0.3))
    ex.cond(z == 1, lambda: ex.sample("y", dist.Normal(2.0, 1.0)), lambda: ex.sample("y", dist.Normal(0.0, 1.0)))


@ex.model
def slab():
    """A choice that is made in one branch only."""
    z = ex.sample("z", dist.Bernoulli(0.3))
    x = ex.cond(z == 1, lambda: ex.sample("x", dist.Normal(2.0, 1.0)), lambda: 0.0)
    ex.sample("y", dist.Normal(x, 1.0))


@ex.model
def walk():
    a = ex.sample("a", dist.Normal(0.0, 1.0))
    lax.scan(lambda x, _: (ex.sample("x", dist.Normal(x, 1.0)), None), a, length=4)


@ex.model
def pair():
    ex.sample("b", dist.Normal(1.0, 2.0))
    ex.sample("c", dist.Normal(3.0, 4.0))


@ex.model
def outer():
    ex.sample("a", pair())
    ex.sample("d", dist.Normal(0.0, 1.0))


@ex.model
def schools(error):
    mu = ex.sample("mu", dist.Normal(0.0, 5.0))
    tau = ex.sample("tau", dist.HalfCauchy(5.0))
    theta = ex.sample("theta", dist.Normal(mu, tau).expand([8]))
    ex.sample("y", dist.Normal(theta, error))
