r"""A bootstrap particle filter and its conditional form, as an algorithm: time is a model's `lax.scan`.

Sources: Gordon, Salmond and Smith 1993; Andrieu, Doucet and Holenstein 2010 (conditional SMC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import ControlFlowError, DistributionError, Posterior, ShapeError, _jax
from expectax.ppl._cut import cut_at_scan
from expectax.ppl._evaluate import Unweighed, evaluate, walk
from expectax.ppl._inline import inline_calls
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices, leaves_of, merged, nested
from expectax.ppl._staging import scalar, stage
from expectax.ppl._table import has_sites, site_table
from expectax.ppl._visitors import rebinding, weighing

from ._algorithm import Run
from ._importance import ancestors, chosen
from ._objective import log_density as score
from ._shared import check_particles, log_mean_exp


class BootstrapFilter(eqx.Module):
    """A bootstrap filter that resamples at every step. Example: see `vi.bootstrap_filter`.

    Attributes:
        num_particles: how many.
    """

    num_particles: int = eqx.field(static=True)

    def run(self, target: Posterior) -> Run:
        """Return one of the trajectories, chosen by its final weight."""
        filtered = _Filter(target, self.num_particles).run(None)
        z = chosen(filtered.trajectories(), filtered.log_weights)
        return Run(z, score(target, z), filtered.log_evidence)

    def conditional(self, target: Posterior, latents: Choices, log_density: Any) -> Any:
        """Keep the first particle on the given trajectory."""
        del log_density
        return _Filter(target, self.num_particles).run(latents).log_evidence

    def evidence(self, target: Posterior) -> Any:
        """Return the log evidence of a run."""
        return _Filter(target, self.num_particles).run(None).log_evidence


def bootstrap_filter(num_particles: int) -> BootstrapFilter:
    r"""A bootstrap particle filter, for targets whose time axis is one plain `lax.scan`.

    Each step draws the particles from the model and weighs them by the step's observations, after multinomial
    resampling: $\hat Z = \prod_t \frac1n \sum_i p(y_t \mid x_t^i)$. With it `vi.marginal(model, data_addresses, ...)` is
    the likelihood of a state-space model (particle marginal Metropolis-Hastings, `inference.pseudo_marginal`), and
    `vi.normalize` a distribution over trajectories (particle Gibbs' conditional SMC scores them).

    Args:
        num_particles: $n$, at least 1.

    Returns:
        An algorithm for `vi.marginal` and `vi.normalize`.

    Raises:
        ValueError: `num_particles` is less than 1.
        ControlFlowError: at first use, if the model has not exactly one scan with sites, or sites after it.

    Sources: Gordon, Salmond and Smith 1993; Andrieu, Doucet and Holenstein 2010.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def walk():
        ...     def step(x, _):
        ...         x = ex.sample("x", dist.Normal(x, 1.0))
        ...         return x, ex.sample("y", dist.Normal(x, 1.0))
        ...     jax.lax.scan(step, 0.0, length=3)
        >>> likelihood = vi.marginal(walk(), "y", vi.bootstrap_filter(1000))
        >>> log_p, _ = likelihood.assess({"y": jnp.array([0.5, 1.0, 0.0])}, key=jax.random.key(0))  # exactly -4.076
        >>> bool(abs(log_p + 4.076) < 0.3)
        True
    """
    check_particles("bootstrap_filter", num_particles)
    return BootstrapFilter(num_particles)


class _Filtered(NamedTuple):
    """What a filter leaves behind; of the choices those that are latent, particles behind time."""

    before: Choices
    scanned: Choices
    ancestors: Any
    reverse: bool
    log_weights: Any
    log_evidence: Any

    def trajectories(self) -> Choices:
        """Follow the surviving particles back through their ancestors; particles come first."""

        def back(index: Any, step: Any) -> tuple[Any, Any]:
            parents, choices = step
            return parents[index], jax.tree.map(lambda x: x[index], choices)

        last = jnp.arange(self.log_weights.size)
        first, followed = lax.scan(back, last, (self.ancestors, self.scanned), reverse=not self.reverse)
        before = jax.tree.map(lambda x: x[first], self.before)
        return merged(before, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), followed))


class _Filter:
    """A target cut at its scan, run for a cloud of particles."""

    def __init__(self, target: Posterior, num_particles: int):
        self.target, self.n = target, num_particles
        staged = stage(target.program)
        _check(dict(leaves_of(staged.sites)), target)
        jaxpr = inline_calls(staged.jaxpr, staged.arguments)
        self.cut = cut_at_scan(jaxpr.jaxpr, "vi.bootstrap_filter")
        self.shared = _jax.Environment.of(jaxpr, staged.arguments)
        walk(self.cut.shared, self.shared, rebinding, iter(()), {})
        scan = self.cut.scan
        self.body, (self.num_consts, num_carry) = scan.params["jaxpr"], _jax.scan_sizes(scan)
        self.first_x = self.num_consts + num_carry
        own = [v for v in scan.invars[self.first_x :] if not isinstance(v, _jax.Literal) and v in self.cut.particle]
        late = [eqn for eqn in self.cut.after if has_sites(eqn)]
        if late or own:
            raise ControlFlowError(
                f"vi.bootstrap_filter: the scan at {_jax.place(scan)} "
                + ("has sites after it" if late else "runs over values that depend on a choice before it")
                + ", which it cannot filter. Use vi.sir, or inference.particle_filter."
            )

    def run(self, own: Choices | None) -> _Filtered:
        """Filter; the first particle keeps to given latents."""
        names, params = set(site_table(self.body)), self.cut.scan.params
        split = lambda tree: [{a: x for a, x in tree.items() if (a in names) == inside} for inside in (False, True)]  # noqa: E731
        outside, observed = split(self.target.observations)
        first_path, path = (None, None) if own is None else split(own)
        (log_w, values), before = self._cloud(first_path, self._start, outside)
        xs = [self.shared.read(v) for v in self.cut.scan.invars[self.first_x :]]
        still = values[: self.num_consts]

        def step(state: Any, inputs: Any) -> tuple[Any, Any]:
            log_w, still, carry, log_z = state
            x, y, now = inputs
            index = ancestors(log_w) if own is None else ancestors(log_w).at[0].set(0)
            still, carry = jax.tree.map(lambda v: v[index], (still, carry))

            def move(visitor: Any, given: Choices, still: Any, carry: Any) -> Any:
                outcome = evaluate(self.body, [*still, *carry, *x], visitor, None, merged(given, y))
                return (scalar(outcome.log_weight), outcome.outputs[: len(carry)]), outcome.choices

            (following, carry), choices = self._cloud(now, move, {}, still, carry)
            return (following, still, carry, log_z + log_mean_exp(log_w)), (self._latent(choices), index)

        start = (log_w, still, values[self.num_consts :], jnp.zeros((), log_w.dtype))
        options = {"length": params["length"], "reverse": params["reverse"]}
        (log_w, _, _, log_z), (choices, index) = lax.scan(step, start, (xs, observed, path), **options)
        evidence = log_z + log_mean_exp(log_w)
        return _Filtered(self._latent(before), choices, index, params["reverse"], log_w, evidence)

    def _start(self, visitor: Any, given: Choices) -> Any:
        """Run one particle up to the scan: its weight, the scan's constants and carry, its choices."""
        env = _jax.Environment(self.shared)
        outcome = walk(self.cut.before, env, visitor, iter(()), given)
        values = [jnp.asarray(env.read(v)) for v in self.cut.scan.invars[: self.first_x]]
        return (jnp.asarray(scalar(outcome.log_weight), jnp.result_type(float)), values), outcome.choices

    def _cloud(self, path: Choices | None, run: Callable[..., Any], given: Choices, *cloud: Any) -> Any:
        """Run all particles, the first one along a path if there is one: its choices have no weight."""
        free = lambda _, *own: run(rebinding, given, *own)  # noqa: E731
        if path is None:
            return jax.vmap(free)(jnp.arange(self.n), *cloud)
        along = nested((p, Unweighed(x)) for p, x in leaves_of(path))
        first = run(weighing, merged(along, given), *jax.tree.map(lambda x: x[0], cloud))
        if self.n == 1:
            return jax.tree.map(lambda x: jnp.asarray(x)[None], first)
        others = jax.vmap(free)(jnp.arange(self.n - 1), *jax.tree.map(lambda x: x[1:], cloud))
        return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), first, others)

    def _latent(self, choices: Choices) -> Choices:
        observed = dict(leaves_of(self.target.observations))
        return nested((p, x) for p, x in leaves_of(choices) if p not in observed)


def _check(sites: dict[str, Any], target: Posterior) -> None:
    if any(isinstance(y, Masked) for _, y in leaves_of(target.observations)):
        raise ShapeError("vi.bootstrap_filter: a target with missing data cannot be filtered here.")
    for path, entry in sites.items():
        if entry.estimated:
            raise DistributionError(
                f"vi.bootstrap_filter: the density of {path!r} at {entry.site.where} is only estimated. Use vi.sir."
            )
