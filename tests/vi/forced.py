"""Sites whose draws are given, so that a test can run an estimator on every outcome of its own random choices."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

import expectax as ex
from expectax import dist, vi
from expectax.ppl import _jax


class Forced(dist.Distribution):
    """`base`, but its sampler returns `outcomes[..., which]`: one given outcome for each independent sample."""

    pytree_data_fields = ("base", "outcomes", "which")
    has_rsample = False

    def __init__(self, base: Any, outcomes: Any):
        self.base, self.outcomes, self.which = base, outcomes, 0
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return jnp.broadcast_to(self.outcomes[..., self.which], sample_shape + self.shape())

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        return self.base.log_prob(value)


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(4)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Nodes(Forced):
    r"""A normal at $x = \mu + \sigma\epsilon_o$, with $\epsilon_o$ a node of Gauss-Hermite quadrature.

    Weighted sums over the nodes are exact expectations of polynomials up to degree 7.
    """

    has_rsample = True

    def sample(self, key: Any, sample_shape: Any = ()) -> Any:
        return self.base.loc + self.base.scale * jnp.take(NODES, super().sample(key, sample_shape))


def by_sample(draw_site: Any) -> Any:
    """Return `draw_site` with `which` set to the number of the sample, where several samples are taken."""

    def draw(site: Any, leaves: Any, key: Any) -> Any:
        names = site.distribution(list(range(len(leaves))))  # each field is the number of its leaf
        if isinstance(names, Forced) and (samples := _jax.lane_axes()):
            leaves = [lax.axis_index(samples[0]) if j == names.which else leaf for j, leaf in enumerate(leaves)]
        return draw_site(site, leaves, key)

    return draw


def choose(strategy: Any) -> Callable[..., Any]:
    """Return `site(address, distribution, outcome)` with a strategy."""

    def site(address: str, d: Any, o: Any) -> Any:
        if isinstance(strategy, vi.Enum):
            return ex.sample(address, d, gradient=strategy)
        return ex.sample(address, Nodes(d, o) if isinstance(d, dist.Normal) else Forced(d, o), gradient=strategy)

    return site


pathwise = choose(vi.Reparam())
