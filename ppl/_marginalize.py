r"""`marginalize_discrete`: a program whose finite choices are summed out exactly.

The program becomes one equation that holds all of it. Its other sites stay choices; their joint density is
$\sum_d p(z, d)$, found by enumeration (`_enumerate`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from . import _jax
from ._dependence import dependences
from ._enumerate import Lost, Walk
from ._errors import ControlFlowError
from ._evaluate import NOTHING, Outcome, Visitor, evaluate
from ._factor import Lifted, eliminate, scalar_total
from ._masked import Masked, expand
from ._nested import Choices, leaves_of, nested
from ._program import Program, bound_program, model
from ._rewrite import outputs_of
from ._selection import chosen_by
from ._staging import stage
from ._table import Entry, choices_of, site_table
from ._visitors import generating


def marginalize_discrete(program: Program, selection: Any = None) -> Program:
    r"""Sum finite choices out of a program, exactly: its density becomes $p(z) = \sum_d p(z, d)$.

    What is left can be sampled by NUTS, optimised, or conditioned like any program. The cost is that of variable
    elimination: N independent lanes of K values cost N K, a chain in a `lax.scan` costs $T K^2$ (the forward
    recursion), found in the program without annotation.

    Args:
        program: a bound program.
        selection: the choices to sum out; all of finite support, if None.

    Returns:
        A program without these choices. Parts of its return value, and recorded values, that depend on them become
        None, or go. `simulate` still draws them, and forgets them; `generate`'s weights are those of the marginal.

    Raises:
        AddressError: the selection is unknown.
        ControlFlowError: a choice has no finite support, is summed by index, enters another site across its lanes or
            a scan's carry beyond the last step, decides whether another choice is made, or meets a scaled site.

    Condition on whole observations only; per-site densities (`site_log_densities`) do not exist for it.

    Source: Zhang and Poole 1996 (variable elimination); Rabiner 1989 (forward recursion); Obermeyer et al. 2019.

    Example:
        >>> import jax, jax.numpy as jnp, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def mixture(centres):
        ...     def point(_):
        ...         k = ex.sample("k", dist.Categorical(jnp.array([0.5, 0.5])))
        ...         ex.sample("y", dist.Normal(centres[k], 1.0))
        ...     jax.vmap(point)(jnp.arange(3))
        >>> program = ex.marginalize_discrete(mixture(jnp.array([-1.0, 1.0])))
        >>> round(float(program.assess({"y": jnp.zeros(3)})[0]), 4)
        -4.2568
    """
    staged = stage(bound_program(program, "marginalize_discrete"))
    entries = dict(leaves_of(staged.sites))
    if selection is None:
        chosen = {path: _finite(entry) for path, entry in entries.items()}
    else:
        chosen = chosen_by(selection, staged.sites, "marginalize_discrete")
    for path, wanted in chosen.items():
        if wanted is not False and (wanted is not True or not _finite(entries[path])):
            raise ControlFlowError(
                f"marginalize_discrete at {_jax.caller()}: {path!r} (at {entries[path].site.where}) "
                + ("has no finite support." if wanted is True else "is summed out as a whole, not by index.")
            )
    hidden = frozenset(path for path, wanted in chosen.items() if wanted is not False)
    if not hidden:
        return program
    known = dependences(staged.jaxpr)
    lost = tuple(bool(paths & hidden) for paths in known.outputs)
    gone = {p for p, e in leaves_of(staged.table) if e.kind == "deterministic" and known.parents[p] & hidden}
    return _marginalized(program, tuple(sorted(hidden)), lost, tuple(sorted(gone)))


def _finite(entry: Entry) -> bool:
    return entry.site.distribution([None] * entry.site.structure.num_leaves).has_enumerate_support


@model
def _marginalized(program: Program, hidden: tuple[str, ...], lost: tuple[bool, ...], gone: tuple[str, ...]) -> Any:
    leaves, structure = jax.tree.flatten(program)
    box: list[Any] = []

    def run(*leaves: Any) -> Any:
        inner = jax.tree.unflatten(structure, leaves)
        names = lambda path: None if path in gone else path.rsplit("/", 1)[-1]  # noqa: E731
        staged, outputs = outputs_of(inner, lambda place: place.bind(), {}, names)
        box.append(staged.returned)
        return [x for x, dropped in zip(outputs, lost, strict=True) if not dropped]

    jaxpr = jax.make_jaxpr(run)(*leaves)
    kept = iter(marginal_p.bind(*leaves, jaxpr=jaxpr, hidden=hidden))
    return box[-1]([None if dropped else next(kept) for dropped in lost])


# --- the equation -----------------------------------------------------------------------------------------------


def _abstract(*_: Any, jaxpr: Any, hidden: Any) -> Any:
    del hidden
    return [_jax.ShapedArray(aval.shape, aval.dtype) for aval in jaxpr.out_avals]


def _batch(axis: Any, args: Any, dims: Any, *, jaxpr: Any, hidden: Any) -> Any:
    mapped = _jax.over_axis(jaxpr, axis, dims)
    outputs = marginal_p.bind(*args, jaxpr=mapped, hidden=hidden)
    return outputs, [0] * len(outputs)


def _outside(*_: Any, **__: Any) -> Any:
    raise ControlFlowError(
        f"a program whose choices are summed out, met at {_jax.caller()}, cannot be followed here. Call a method of the "
        "bound program; as a guide use the program itself."
    )


marginal_p = _jax.define_primitive(
    "marginal",
    abstract=_abstract,
    batch=_batch,
    implementation=_outside,
    lowering=_outside,
    jvp=_outside,
    multiple_results=True,
    site=True,
)


def evaluate_marginal(eqn: Any, values: Any, visitor: Visitor, key: Any, given: Choices, mask: Any) -> Outcome:
    """Run a marginalised program: draw what is not given, and sum out its hidden choices."""
    jaxpr, hidden = eqn.params["jaxpr"], frozenset(eqn.params["hidden"])
    run = _Run(jaxpr, hidden, values, mask)
    if visitor.kind == "generate":
        return _generate(run, key, given)
    if visitor.kind == "assess":
        return run.walk("score", given)
    if visitor.kind in ("weigh", "project"):
        whole = run.walk("score", given)
        rest = run.walk("score", given, _open(run, given), count_fixed=visitor.kind == "project")
        return whole._replace(log_weight=whole.log_density - rest.log_density)
    if visitor.kind in ("constrain", "unconstrain"):
        return run.walk(visitor.kind, given)
    raise ControlFlowError(
        f"at {_jax.caller()}: the sites of a program whose choices {', '.join(map(repr, sorted(hidden)))} are summed out "
        "have no densities or draws of their own, which debug, site_log_densities, log_likelihood and objectives need. Use "
        "the program itself, before marginalize_discrete."
    )


class _Run:
    """A marginalised program with its arguments."""

    def __init__(self, jaxpr: Any, hidden: frozenset[str], values: Any, mask: Any):
        self.jaxpr, self.hidden, self.values, self.mask = jaxpr, hidden, values, mask
        table = site_table(jaxpr)
        self.sites = {p: e for p, e in leaves_of(choices_of(table)) if p not in hidden}

    def walk(self, mode: str, given: Choices, counted: Choices | None = None, count_fixed: bool = True) -> Outcome:
        """Sum out; the density is that of the counted elements (all, if None)."""
        state = Walk(self.hidden, mode, {}, [0], count_fixed)
        inputs = [Lifted(jnp.asarray(x), {}) for x in self.values]
        mask = None if self.mask is None else Lifted(self.mask, {})
        outputs = state.run(self.jaxpr, inputs, given, counted or {}, "", mask)
        for path, flags in state.present.items():
            if isinstance(flags, Lost) and self.sites[path].conditional:
                raise ControlFlowError(f"marginalize_discrete: {flags.reason}.")
        lost = next((x for x in outputs if isinstance(x, Lost) or x.depends), None)
        assert lost is None, lost
        total = scalar_total(eliminate(state.factors, _numbers(state.factors), state.variables))
        present = {p: f for p, f in state.present.items() if not isinstance(f, Lost)}
        return NOTHING._replace(
            outputs=[x.array for x in outputs],
            choices=nested((p, state.records[p]) for p in self.sites),
            log_density=total,
            log_weight=total,
            present=nested(present.items()),
            deterministic=nested(state.deterministic.items()),
        )


def _numbers(factors: Any) -> list[int]:
    return sorted({number for factor in factors for number in factor.depends})


def _open(run: _Run, given: Choices) -> Choices:
    """Return which elements are not wanted or not given, by path."""
    known = dict(leaves_of(given))
    flags: dict[str, Any] = {}
    for path, entry in run.sites.items():
        own = known.get(path)
        flags[path] = own is None
        if isinstance(own, Masked):
            flags[path] = jnp.broadcast_to(~expand(own.mask, jnp.zeros(entry.elements)), entry.elements)
    return nested(flags.items())


def _generate(run: _Run, key: Any, given: Choices) -> Outcome:
    """Draw forwards, forget the hidden choices; the weight is the marginal density less that of what was drawn."""
    drawn = evaluate(run.jaxpr, run.values, generating, key, given, run.mask)
    choices = {p: v for p, v in leaves_of(drawn.choices) if p not in run.hidden}
    flags = dict(leaves_of(_open(run, given)))
    whole = run.walk("score", nested(choices.items()))
    fixed = any(e.kind == "observed" for _, e in leaves_of(site_table(run.jaxpr)))
    if not fixed and all(flag is True for flag in flags.values()):
        log_weight: Any = 0.0
    elif all(flag is False for flag in flags.values()):
        log_weight = whole.log_density
    else:
        proposal = run.walk("score", nested(choices.items()), nested(flags.items()), count_fixed=False)
        log_weight = whole.log_density - proposal.log_density
    return whole._replace(log_weight=log_weight, choices=nested(choices.items()), outputs=drawn.outputs)
