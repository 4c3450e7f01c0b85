r"""A posterior in time: its model cut at its one `lax.scan`, so that a particle can stop after any step.

$\gamma_t(z_{1:t})$ is the density of what stands before the scan and of its first $t$ steps, with their observations. Each
$\gamma_t$ is a posterior of its own (`prefix`); between two of them lies one `step`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from expectax.ppl import ControlFlowError, Model, Posterior, Program, _jax
from expectax.ppl._cut import Cut, cut_at_scan
from expectax.ppl._evaluate import Visitor, evaluate, without_positions
from expectax.ppl._inline import inline_calls
from expectax.ppl._masked import Masked
from expectax.ppl._nested import Choices
from expectax.ppl._staging import scalar, stage
from expectax.ppl._table import has_sites, site_table
from expectax.ppl._visitors import rebinding


class Step(NamedTuple):
    """What one step of one particle leaves: where it stands, what it chose and put out, and its log weight."""

    state: list[Any]
    choices: Choices
    outputs: list[Any]
    log_weight: Any


class Sequence(NamedTuple):
    """A program cut at its scan.

    `shared` holds the values that no choice touches. A particle's own state is the list of those inputs of the scan
    that are its own: constants and whole `xs` that depend on choices before the scan, and the carry.
    """

    cut: Cut
    shared: _jax.Environment
    what: str

    @classmethod
    def of(cls, program: Program, what: str) -> Sequence:
        """Cut a program; refuse one without exactly one scan that holds sites."""
        staged = stage(program)
        jaxpr = inline_calls(staged.jaxpr, staged.arguments)
        cut = cut_at_scan(jaxpr.jaxpr, what)
        shared = _jax.Environment.of(jaxpr, staged.arguments)
        for eqn in cut.shared:
            _bound(eqn, shared)
        return cls(cut, shared, what)

    @property
    def length(self) -> int:
        """The number of steps."""
        return self.cut.scan.params["length"]

    @property
    def body(self) -> Any:
        """One step's equations."""
        return self.cut.scan.params["jaxpr"]

    @property
    def has_more(self) -> bool:
        """Whether choices or data stand after the scan."""
        return any(has_sites(eqn) for eqn in self.cut.after)

    @property
    def addresses(self) -> set[str]:
        """The addresses inside the scan."""
        return set(site_table(self.body))

    def place(self, time: Any) -> Any:
        """Return the index, in the model's arrays, of the step that is done after `time` others."""
        return self.length - 1 - time if self.cut.scan.params["reverse"] else time

    def observed(self, observations: Choices) -> Choices:
        """Return the part of observations, or of choices, that lies in the scan, time first."""
        names = self.addresses
        return {a: x for a, x in observations.items() if a in names}

    def at(self, observations: Choices, time: Any) -> Choices:
        """Return the scan's observations at one step."""
        known = jax.tree.map(without_positions, self.observed(observations), is_leaf=lambda y: isinstance(y, Masked))
        return jax.tree.map(lambda x: jnp.asarray(x)[self.place(time)], known)

    def before(self) -> list[Any]:
        """Run what stands before the scan, its choices left to the enclosing program; return a particle's first state."""
        env = _jax.Environment(self.shared)
        for eqn in self.cut.before:
            _bound(eqn, env)
        return [jnp.asarray(env.read(v)) for v, own in zip(self.cut.scan.invars, self.owned(), strict=True) if own]

    def owned(self) -> list[bool]:
        """Tell which inputs of the scan are a particle's own."""
        num_consts, num_carry = _jax.scan_sizes(self.cut.scan)
        touched = [not isinstance(v, _jax.Literal) and v in self.cut.particle for v in self.cut.scan.invars]
        return [own or num_consts <= n < num_consts + num_carry for n, own in enumerate(touched)]

    def inputs(self, state: list[Any], time: Any) -> list[Any]:
        """Return the inputs of a step for a particle in a state."""
        num_consts, num_carry = _jax.scan_sizes(self.cut.scan)
        own, found = iter(state), []
        for n, (v, mine) in enumerate(zip(self.cut.scan.invars, self.owned(), strict=True)):
            value = next(own) if mine else self.shared.read(v)
            found.append(value if n < num_consts + num_carry else jnp.asarray(value)[self.place(time)])
        return found

    def step(self, state: list[Any], time: Any, given: Choices, visitor: Visitor = rebinding) -> Step:
        """Do one step; choices that are not given are left to the enclosing program, those that are given weigh."""
        num_consts, num_carry = _jax.scan_sizes(self.cut.scan)
        outcome = evaluate(self.body, self.inputs(state, time), visitor, None, given)
        carry, outputs = outcome.outputs[:num_carry], outcome.outputs[num_carry:]
        return Step(self.moved(state, carry), outcome.choices, outputs, jnp.asarray(scalar(outcome.log_weight)))

    def carry_place(self) -> tuple[int, int]:
        """Return where the carry stands in a particle's state, and how many arrays it is."""
        num_consts, num_carry = _jax.scan_sizes(self.cut.scan)
        return sum(self.owned()[:num_consts]), num_carry

    def moved(self, state: list[Any], carry: list[Any]) -> list[Any]:
        """Return a state with a new carry."""
        first, num_carry = self.carry_place()
        return [*state[:first], *carry, *state[first + num_carry :]]


def prefix(posterior: Posterior, time: int, what: str) -> Posterior:
    """Return the posterior of the first steps; its program returns the state after them."""
    sequence = Sequence.of(posterior.program, what)
    names, whole = sequence.addresses, posterior.observations
    kept = slice(sequence.length - time, None) if sequence.cut.scan.params["reverse"] else slice(None, time)
    later = {a for eqn in sequence.cut.after for a in _addresses(eqn)}
    observations = {
        a: jax.tree.map(lambda x: jnp.asarray(x)[kept], y) if a in names else y
        for a, y in whole.items()
        if a not in later
    }
    if time == 0:
        observations = {a: y for a, y in observations.items() if a not in names}
    return Posterior(_first_steps(posterior.program, time, what), observations)


def _run_first_steps(program: Program, time: int, what: str) -> list[Any]:
    sequence = Sequence.of(program, what)
    state = sequence.before()
    if time == 0:
        return state
    num_consts, num_carry = _jax.scan_sizes(sequence.cut.scan)
    reverse = sequence.cut.scan.params["reverse"]
    first = sum(sequence.owned()[:num_consts])

    def step(carry: list[Any], now: Any) -> tuple[list[Any], None]:
        outputs = _outputs(sequence.body, sequence.inputs(sequence.moved(state, carry), now))
        return outputs[:num_carry], None

    order = jnp.arange(time) if not reverse else jnp.arange(time)[::-1]
    carry, _ = lax.scan(step, state[first : first + num_carry], order, reverse=reverse)
    return sequence.moved(state, carry)


_first_steps = Model(_run_first_steps)


def _outputs(jaxpr: Any, args: list[Any]) -> list[Any]:
    """Bind a jaxpr's equations again, sites too."""
    env, body = _jax.Environment.of(jaxpr, args), _jax.close(jaxpr)[0]
    for eqn in body.eqns:
        _bound(eqn, env)
    return [env.read(v) for v in body.outvars]


def _bound(eqn: Any, env: _jax.Environment) -> None:
    env.update(zip(eqn.outvars, _jax.bind(eqn, [env.read(v) for v in eqn.invars]), strict=True))


def _addresses(eqn: Any) -> set[str]:
    return {a for jaxpr in _jax.sub_jaxprs(eqn) for a in site_table(jaxpr)} | (
        {eqn.params["site"].address} if "site" in eqn.params else set()
    )


def check_in_time(posterior: Posterior, what: str) -> int:
    """Return the number of steps of a posterior whose choices all stand before or in its scan."""
    sequence = Sequence.of(posterior.program, what)
    if sequence.has_more:
        raise ControlFlowError(
            f"{what}: the model has choices or data after its scan at {_jax.place(sequence.cut.scan)}. Put them before it, or "
            "use particle_filter, which runs them on the last particles."
        )
    return sequence.length
