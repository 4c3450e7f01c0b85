"""A hidden Markov model with two states and normal observations, the states summed out.

Source: posteriordb `hmm_example-hmm_example` (BSD-3-Clause); model and data of github.com/imadmali/bball-hmm. The sum
over states is the forward algorithm: L. R. Rabiner, "A tutorial on hidden Markov models", Proceedings of the IEEE
77 (1989).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro import distributions as dist
from numpyro.distributions import constraints

from expectax.ppl import Posterior, model, sample

from ._restricted import Restricted
from ._stan import Entry, Parameter, positive_ordered, simplex


class HiddenMarkovNormal(dist.Distribution):
    r"""A series $y_t \sim N(\text{loc}_{s_t}, 1)$ with states $s_t$ of a Markov chain, uniform at first and summed out.

    Args:
        transition: matrix of $P(s_{t+1} = j \mid s_t = i)$, row $i$ and column $j$.
        loc: mean of the observations in each state.
        num_steps: length of the series.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from expectax.models.posteriordb import HiddenMarkovNormal
        >>> d = HiddenMarkovNormal(jnp.array([[0.9, 0.1], [0.2, 0.8]]), jnp.array([0.0, 5.0]), 10)
        >>> d.log_prob(d.sample(jax.random.key(0))).shape
        ()
    """

    arg_constraints = {}
    pytree_data_fields = ("transition", "loc")

    def __init__(
        self,
        transition: Float[Array, "state state"],
        loc: Float[Array, " state"],
        num_steps: int,
        *,
        validate_args: bool | None = None,
    ):
        """Keep the parameters."""
        self.transition, self.loc = transition, loc
        super().__init__((), (num_steps,), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """All series of real numbers."""
        return constraints.real_vector

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Return the log density of one series, by the forward algorithm."""
        log_transition = jnp.log(self.transition)
        emission = dist.Normal(self.loc, 1.0).log_prob(jnp.asarray(value)[:, None])

        def forward(log_alpha: Any, now: Any) -> Any:
            return jax.nn.logsumexp(log_alpha[:, None] + log_transition, axis=0) + now, None

        start = emission[0] - jnp.log(self.loc.size)
        return jax.nn.logsumexp(jax.lax.scan(forward, start, emission[1:])[0])

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        """Draw states, then observations."""
        if sample_shape:
            keys = jax.random.split(key, sample_shape)
            draw = self.sample
            for _ in sample_shape:
                draw = jax.vmap(draw)
            return draw(keys)
        first, chain, noise = jax.random.split(key, 3)

        def move(state: Any, key: Any) -> Any:
            return jax.random.categorical(key, jnp.log(self.transition)[state]), state

        start = jax.random.randint(first, (), 0, self.loc.size)
        states = jax.lax.scan(move, start, jax.random.split(chain, self.event_shape[0]))[1]
        return self.loc[states] + jax.random.normal(noise, self.event_shape)


@model
def hmm_example(num_steps: int) -> None:
    r"""Two states with means $0 < \mu_1 < \mu_2$, normal observations of sd 1, and rows of transition probabilities.

    Priors: $\mu_1 \sim N(3, 1)$ and $\mu_2 \sim N(10, 1)$, restricted to their order; the rows $\theta_k$ are uniform.

    Args:
        num_steps: length of the series.

    Sites: `theta1`, `theta2`, `mu` and `y`.

    Example: see `load`.
    """
    theta1 = sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = sample("theta2", dist.Dirichlet(jnp.ones(2)))
    prior = dist.Normal(jnp.array([3.0, 10.0]), 1.0).to_event(1)
    mu = sample("mu", Restricted(prior, constraints.positive_ordered_vector))
    sample("y", HiddenMarkovNormal(jnp.stack([theta1, theta2]), mu, num_steps))


def _condition(data: dict[str, Any]) -> Posterior:
    return hmm_example(data["N"]).given({"y": jnp.array(data["y"], float)})


ENTRY = Entry(
    _condition,
    (Parameter("theta1", simplex, (1,)), Parameter("theta2", simplex, (1,)), Parameter("mu", positive_ordered, (2,))),
)
