"""Stan's Runge-Kutta solver with its errors: which steps it takes, and which derivatives it returns.

Stan's `integrate_ode_rk45` hands the states and their derivatives in the initial state and the parameters, as one
coupled system, to Boost.odeint: the errors of both choose the steps, and the derivatives are those of the solution with
these steps held fixed. With loose tolerances its log densities can be met only by taking the same steps.

Sources: Stan Reference Manual and Stan Math `ode_rk45.hpp` (the coupled system, the first step of 0.1); documentation
and headers of Boost.odeint (`default_error_checker`, `default_step_adjuster`, `integrate_times` with a dense output
stepper); J. R. Dormand and P. J. Prince, Journal of Computational and Applied Mathematics 6 (1980);
E. Hairer, S. P. Norsett and G. Wanner, Solving Ordinary Differential Equations I, 2nd ed. (1993), II.5 and II.6.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST_STEP = 0.1

# Dormand and Prince's method: stages as sums of earlier slopes; the step of order five, whose slope at the end is the
# seventh and the first of the next step; and the embedded step of order four.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
FIFTH = np.array([*STAGES[-1], 0])
FOURTH = np.array([5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40])

# The continuous extension bends Hermite's cubic by s^2 (1 - s)^2 SCALE (CONSTANT - LINEAR s), at the fraction s of a
# step. (It is of degree five. Hairer's program DOPRI5 has the last factor at s = 1/2 throughout.)
SCALE = np.array([
    -5 / 11282082432, 0, 100 / 32700410799, -25 / 1880347072, 32805 / 199316789632, -55 / 822651844, 10 / 29380423
])  # fmt: skip
CONSTANT = np.array([2558722523, 0, 882725551, 443332067, 23143187, 29972135, 7414447])
LINEAR = np.array([31403016, 0, 15701508, 31403016, 3489224, 7076736, 829305])


class State(NamedTuple):
    """Where the integration stands: time, next step to try, state, its slope, and the states at the times passed."""

    t: jax.Array
    h: jax.Array
    y: jax.Array
    slope: jax.Array
    out: jax.Array


def slopes(f, y, slope, h):
    """Return the state after a step, and the seven slopes: the first is given, the last is that after the step."""
    k = [slope]
    for weights in STAGES:
        y_stage = y + h * sum(w * each for w, each in zip(weights, k, strict=True))
        k.append(f(y_stage))
    return y_stage, jnp.stack(k)


def error(y, k, h, rtol, atol):
    """Return the largest estimated error by what is allowed, which counts the slope before the step too."""
    allowed = atol + rtol * (jnp.abs(y) + h * jnp.abs(k[0]))
    return jnp.max(jnp.abs(h * (FIFTH - FOURTH) @ k) / allowed)


def next_step(h, error):
    """Return the step to try next: after too large an error, after a small one, or as it is after one in between."""
    smaller = h * jnp.maximum(0.9 * error ** (-1 / 3), 1 / 5)
    larger = h * 0.9 * jnp.maximum(error, 5.0**-5) ** (-1 / 5)
    return jnp.where(error > 1, smaller, jnp.where(error < 0.5, larger, h))


def interpolate(y, k, h, s):
    """Return the state at the fraction `s` of a step: Hermite's cubic and a bend that leaves both ends as they are."""
    weights = s**2 * (3 - 2 * s) * FIFTH + s**2 * (1 - s) ** 2 * SCALE * (CONSTANT - LINEAR * s)
    weights = weights.at[0].add(s * (1 - s) ** 2).at[6].add(s**2 * (s - 1))
    return y + h * weights @ k


def integrate(f, y, times, rtol, atol):
    """Solve y' = f(y) from time 0 and return the states at increasing positive times."""

    def try_step(now):
        h = jnp.minimum(now.h, times[-1] - now.t)  # the last step ends at the last time
        y, k = slopes(f, now.y, now.slope, h)
        e = error(now.y, k, h, rtol, atol)
        passed = (now.t < times) & (times <= now.t + h)
        states = jax.vmap(lambda s: interpolate(now.y, k, h, s))((times - now.t) / h)
        done = State(now.t + h, next_step(h, e), y, k[-1], jnp.where(passed[:, None], states, now.out))
        failed = now._replace(h=next_step(h, e))
        return jax.tree.map(lambda a, b: jnp.where(e > 1, a, b), failed, done)

    start = State(jnp.zeros(()), jnp.array(FIRST_STEP), y, f(y), jnp.full((len(times), len(y)), jnp.nan))
    return jax.lax.while_loop(lambda now: now.t < times[-1], try_step, start).out


def integrate_coupled(f, theta, y, times, rtol, atol):
    """Solve y' = f(theta, y) together with the derivatives of y in `y` at time 0 and in `theta`.

    Returns:
        States, and their derivatives with a last axis of the components of `y` and then of `theta`.
    """
    d, p = len(y), len(theta)

    def coupled(flat):
        y, s = flat[:d], flat[d:].reshape(d, d + p)
        in_theta, in_y = jax.jacfwd(f, (0, 1))(theta, y)
        return jnp.concatenate([f(theta, y), (in_y @ s).at[:, d:].add(in_theta).ravel()])

    flat = integrate(coupled, jnp.concatenate([y, jnp.eye(d, d + p).ravel()]), times, rtol, atol)
    return flat[:, :d], flat[:, d:].reshape(-1, d, d + p)


def solver(f, rtol, atol):
    """Return the states at given times as a function of theta, the initial state and times, with Stan's derivatives."""

    @jax.custom_jvp
    def solve(theta, y, times):
        return integrate_coupled(f, theta, y, times, rtol, atol)[0]

    @solve.defjvp
    def _(primals, tangents):
        states, derivatives = integrate_coupled(f, *primals, rtol, atol)
        return states, derivatives @ jnp.concatenate([tangents[1], tangents[0]])

    return solve
