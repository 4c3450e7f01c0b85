"""A peer's bootstrap filter, run once for each line on standard input; answers with its log evidence.

Run by `filters.py` in the peer's own environment: `filters_peer.py NAME NUM_PARTICLES`.
"""

import os

os.environ.setdefault("NPROC", "8")

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

TIMES, COEFFICIENT, STATE_SD, OBSERVATION_SD = 100, 0.9, 0.5, 0.7


def data() -> np.ndarray:
    """Return the observations, those of `filters.py`."""
    rng, x, ys = np.random.default_rng(0), 0.0, []
    for _ in range(TIMES):
        x = COEFFICIENT * x + STATE_SD * rng.normal()
        ys.append(x + OBSERVATION_SD * rng.normal())
    return np.array(ys)


def with_particles(n: int) -> Callable[[int], float]:
    """Chopin's package, in NumPy and numba."""
    import particles  # pyright: ignore[reportMissingImports]
    from particles import distributions  # pyright: ignore[reportMissingImports]
    from particles import state_space_models as models  # pyright: ignore[reportMissingImports]

    class Walk(models.StateSpaceModel):
        def PX0(self) -> Any:  # noqa: N802
            return distributions.Normal(scale=STATE_SD)

        def PX(self, t: int, xp: Any) -> Any:  # noqa: N802
            return distributions.Normal(loc=COEFFICIENT * xp, scale=STATE_SD)

        def PY(self, t: int, xp: Any, x: Any) -> Any:  # noqa: N802
            return distributions.Normal(loc=x, scale=OBSERVATION_SD)

    ys = data()

    def run(i: int) -> float:
        np.random.seed(i)
        filtered = particles.SMC(fk=models.Bootstrap(ssm=Walk(), data=ys), N=n, resampling="systematic", ESSrmin=0.5)
        filtered.run()
        return float(filtered.logLt)

    return run


def with_cuthbert(n: int) -> Callable[[int], float]:
    """The state-space package in JAX."""
    import jax
    import jax.numpy as jnp
    from cuthbert import filter as run_filter  # pyright: ignore[reportMissingImports]
    from cuthbert.smc import particle_filter  # pyright: ignore[reportMissingImports]
    from cuthbertlib.resampling import systematic  # pyright: ignore[reportMissingImports]
    from cuthbertlib.resampling.adaptive import ess_decorator  # pyright: ignore[reportMissingImports]

    ys = jnp.asarray(data())
    density = lambda x, y: -0.5 * ((y - x) / OBSERVATION_SD) ** 2 - jnp.log(OBSERVATION_SD * jnp.sqrt(2 * jnp.pi))  # noqa: E731
    built = particle_filter.build_filter(
        init_sample=lambda key, *_: jnp.zeros(()),
        propagate_sample=lambda key, x, _: COEFFICIENT * x + STATE_SD * jax.random.normal(key),
        log_potential=lambda before, x, y: density(x, y),
        n_filter_particles=n,
        resampling_fn=ess_decorator(systematic.resampling, 0.5),
    )

    @jax.jit
    def run(key: Any) -> Any:
        key_start, key_run = jax.random.split(key)
        start = built.init_prepare(key=key_start)
        return run_filter(built, ys, start, key=key_run).log_normalizing_constant[-1]

    return lambda i: float(run(jax.random.key(i)))


def main() -> None:
    """Answer each line."""
    run = {"particles": with_particles, "cuthbert": with_cuthbert}[sys.argv[1]](int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
