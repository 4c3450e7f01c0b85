"""A registry of small models whose densities and evidence are known exactly, for laws to be tested over.

Each model takes one data set `(x, y)`: `x` its argument, `y` the value of its site "y". References are plain numpy.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import stats

from expectax import dist, ppl
from helpers import hmm_log_evidence, kalman_log_evidence


@dataclasses.dataclass(frozen=True)
class Exact:
    """A model, three data sets stacked along axis 0, and what is known of it (`z`: choices, `x`, `y`: one data set)."""

    model: ppl.Model
    data: tuple[np.ndarray, np.ndarray]
    log_prior: Callable[[Any, Any], Any]
    log_likelihood: Callable[[Any, Any, Any], Any]
    log_evidence: Callable[[Any, Any], Any]
    retval: Callable[[Any], Any]
    states: Any = None  # finite models: the number of values at each latent address
    moments: Any = None  # Gaussian models: x -> mean and covariance of the flattened latents

    def one(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return data set i."""
        return self.data[0][i], self.data[1][i]

    def posterior(self, x: Any, y: Any) -> ppl.Posterior:
        """Return the model conditioned on one data set."""
        return self.model(x).given({"y": y})


# --- conjugate normal: mu ~ N(x0, x1), y_i ~ N(mu, 0.7) ------------------------------------------------------------


@ppl.model
def conjugate(x):
    mu = ppl.sample("mu", dist.Normal(x[0], x[1]))
    ppl.sample("y", dist.Normal(mu, 0.7).expand([3]))
    return mu


CONJUGATE = Exact(
    conjugate,
    data=(
        np.array([[0.0, 1.0], [1.0, 0.5], [-2.0, 3.0]]),
        np.array([[0.1, -0.4, 0.9], [2.0, 1.0, 0.5], [-1.0, 0.0, 2.0]]),
    ),
    log_prior=lambda z, x: stats.norm.logpdf(z["mu"], x[0], x[1]),
    log_likelihood=lambda z, x, y: stats.norm.logpdf(y, z["mu"], 0.7).sum(),
    log_evidence=lambda x, y: stats.multivariate_normal(np.full(3, x[0]), 0.49 * np.eye(3) + x[1] ** 2).logpdf(y),
    retval=lambda z: z["mu"],
    moments=lambda x: (x[:1], x[1:, None] ** 2),
)


# --- three states: z ~ Cat(x), b ~ Bern(BIAS[z]), y ~ N(CENTRE[z] + b, 0.6) ----------------------------------------

CENTRE, BIAS = np.array([-1.0, 0.5, 2.0]), np.array([0.2, 0.5, 0.9])
PROBS = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8]])


@ppl.model
def three_states(x):
    z = ppl.sample("z", dist.Categorical(probs=x))
    b = ppl.sample("b", dist.Bernoulli(jnp.asarray(BIAS)[z]))
    ppl.sample("y", dist.Normal(jnp.asarray(CENTRE)[z] + b, 0.6))
    return z + b


def three_states_evidence(x, y):
    density = stats.norm.pdf(y, CENTRE[:, None] + np.arange(2), 0.6)  # (z, b)
    return np.log(x @ (density * np.stack([1 - BIAS, BIAS], 1)).sum(1))


THREE_STATES = Exact(
    three_states,
    data=(PROBS, np.array([0.3, 2.2, -1.0])),
    log_prior=lambda z, x: np.log(x[z["z"]]) + stats.bernoulli.logpmf(z["b"], BIAS[z["z"]]),
    log_likelihood=lambda z, x, y: stats.norm.logpdf(y, CENTRE[z["z"]] + z["b"], 0.6),
    log_evidence=three_states_evidence,
    retval=lambda z: z["z"] + z["b"],
    states={"z": 3, "b": 2},
)


# --- mixture in lanes, its label in a nested model: z_i ~ Cat(x), y_i ~ N(CENTRE[z_i] + i, 0.6) ---------------------


@ppl.model
def label(probs):
    return ppl.sample("z", dist.Categorical(probs=probs))


@ppl.model
def mixture(x):
    def point(shift):
        z = ppl.sample("cluster", label(x))
        ppl.sample("y", dist.Normal(jnp.asarray(CENTRE)[z] + shift, 0.6))
        return z

    return jax.vmap(point)(jnp.arange(2.0))


def mixture_evidence(x, y):
    return np.log(stats.norm.pdf(y[:, None], CENTRE + np.arange(2)[:, None], 0.6) @ x).sum()


MIXTURE = Exact(
    mixture,
    data=(PROBS, np.array([[0.3, 2.0], [-1.0, 0.0], [1.0, 3.0]])),
    log_prior=lambda z, x: np.log(x[z["cluster"]["z"]]).sum(),
    log_likelihood=lambda z, x, y: stats.norm.logpdf(y, CENTRE[z["cluster"]["z"]] + np.arange(2), 0.6).sum(),
    log_evidence=mixture_evidence,
    retval=lambda z: z["cluster"]["z"],
    states={"cluster": {"z": 3}},
)


# --- hidden Markov model: z_1 ~ Cat(START), z_t ~ Cat(x[z_{t-1}]), y_t ~ N(CENTRE[z_t], 0.8), t = 1..3 --------------

START = np.array([0.5, 0.3, 0.2])


@ppl.model
def hmm(x):
    def step(probs, _):
        z = ppl.sample("z", dist.Categorical(probs=probs))
        ppl.sample("y", dist.Normal(jnp.asarray(CENTRE)[z], 0.8))
        return x[z], z

    return lax.scan(step, jnp.asarray(START), None, length=3)[1]


HMM = Exact(
    hmm,
    data=(
        np.stack([np.roll(PROBS, k, axis=1) for k in range(3)]),
        np.array([[-0.5, 0.4, 1.0], [0.0, 0.0, 0.0], [2.0, -1.0, 2.0]]),
    ),
    log_prior=lambda z, x: np.log(START[z["z"][0]]) + np.log(x[z["z"][:-1], z["z"][1:]]).sum(),
    log_likelihood=lambda z, x, y: stats.norm.logpdf(y, CENTRE[z["z"]], 0.8).sum(),
    log_evidence=lambda x, y: hmm_log_evidence(START, x, stats.norm.logpdf(y[:, None], CENTRE, 0.8)),
    retval=lambda z: z["z"],
    states={"z": 3},
)


# --- linear-Gaussian: s_t ~ N(x s_{t-1}, L L'), y_t ~ N(s_t[0], 0.9), s_0 = ORIGIN, t = 1..4 --------------------------

ORIGIN, SQRT_Q, TIMES = np.array([1.0, -0.5]), np.array([[0.8, 0.0], [0.3, 0.5]]), 4
ROTATION = np.array([[0.8, 0.3], [-0.2, 0.9]])


@ppl.model
def linear_gaussian(x):
    def step(s, _):
        s = ppl.sample("s", dist.MultivariateNormal(x @ s, scale_tril=jnp.asarray(SQRT_Q)))
        ppl.sample("y", dist.Normal(s[0], 0.9))
        return s, s[0]

    return lax.scan(step, jnp.asarray(ORIGIN), None, length=TIMES)[1]


def linear_gaussian_moments(x: Any) -> Any:
    """Stack s_t = x^t s_0 + sum_{u <= t} x^(t-u) L w_u with standard normal w."""
    power = [np.linalg.matrix_power(x, t) for t in range(TIMES + 1)]
    mix = np.block(
        [[power[t - u] @ SQRT_Q if u <= t else np.zeros((2, 2)) for u in range(TIMES)] for t in range(TIMES)]
    )
    return np.concatenate([power[t + 1] @ ORIGIN for t in range(TIMES)]), mix @ mix.T


def linear_gaussian_prior(z, x):
    mean, cov = linear_gaussian_moments(x)
    return stats.multivariate_normal(mean, cov).logpdf(z["s"].ravel())


LINEAR_GAUSSIAN = Exact(
    linear_gaussian,
    data=(
        np.stack([ROTATION, ROTATION.T, 0.5 * np.eye(2)]),
        np.array([[0.5, 1.0, -0.3, 0.2], [0.0, 0.0, 0.0, 0.0], [1.5, 2.0, 0.0, 1.0]]),
    ),
    log_prior=linear_gaussian_prior,
    log_likelihood=lambda z, x, y: stats.norm.logpdf(y, z["s"][:, 0], 0.9).sum(),
    log_evidence=lambda x, y: kalman_log_evidence(
        x, SQRT_Q @ SQRT_Q.T, np.eye(1, 2), 0.81 * np.eye(1), ORIGIN, np.zeros((2, 2)), y[:, None]
    ),
    retval=lambda z: z["s"][:, 0],
    moments=linear_gaussian_moments,
)

EXACT = {
    "conjugate": CONJUGATE,
    "three_states": THREE_STATES,
    "mixture": MIXTURE,
    "hmm": HMM,
    "linear_gaussian": LINEAR_GAUSSIAN,
}
