"""A walk over equations in which some finite sites stand for all their values at once.

Values that depend on such a site carry an axis for it (`Lifted`), and every site contributes a factor; the factors are
summed by variable elimination. All elements (lanes, batch) of a site are enumerated at once, so N independent lanes
cost K, not K^N. A scan is summed by the forward recursion (`_enumerate_scan`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from numpyro import distributions as dist

from . import _jax
from ._branch import branches_of, clamped, guarded, select
from ._errors import ControlFlowError
from ._evaluate import Observed
from ._factor import Factor, Lifted, Variable, Variables, lift, make_factor
from ._finite import single_support
from ._flow import Dependence, flow, lane_mover, merge, moved
from ._masked import Masked
from ._nested import Choices
from ._nesting import scope_address
from ._observe import deterministic_p
from ._sample import Site, along_elements, lanes_of, sample_p
from ._support import density_in_support
from ._table import has_sites, place_of, unfollowable
from ._visitors import Partial, bijection_onto, constraining, unconstraining


class Lost(NamedTuple):
    """A value that only a run with one definite assignment has; `reason` says why."""

    reason: str


class Walk:
    """What the walk carries: the summed sites, the given values, and what has been found so far.

    `mode` is `score`, `constrain` or `unconstrain`; `count_fixed`: does the density of what the program observes count?
    """

    def __init__(
        self, hidden: frozenset[str], mode: str, variables: Variables, numbers: list[int], count_fixed: bool = True
    ):
        """Start a walk; `variables` and the counter `numbers` are shared by the walks inside one another."""
        self.hidden, self.mode, self.count_fixed = hidden, mode, count_fixed
        self.variables, self.numbers = variables, numbers
        self.factors: list[Factor] = []
        self.records: dict[str, Any] = {}
        self.deterministic: dict[str, Any] = {}
        self.present: dict[str, Any] = {}

    def variable(self, path: str, count: int, elements: tuple[int, ...]) -> int:
        """Return the number of a new variable."""
        self.numbers[0] += 1
        self.variables[self.numbers[0]] = Variable(path, count, elements)
        return self.numbers[0]

    def inner(self) -> Walk:
        """Return a walk of its own over the body of a scan."""
        return Walk(self.hidden, self.mode, self.variables, self.numbers, self.count_fixed)

    def run(self, jaxpr: Any, inputs: list[Any], given: Choices, counted: Choices, path: str, mask: Any) -> list[Any]:
        """Walk a jaxpr whose inputs are lifted or lost; return its outputs, likewise.

        `counted` tells by address which elements of a site's density count: all, where it says nothing.
        """
        opened, consts = _jax.close(jaxpr)
        env: dict[Any, Any] = {v: Lifted(c, {}) for v, c in zip(opened.constvars, consts, strict=True)}
        env.update(zip(opened.invars, inputs, strict=True))
        for eqn in opened.eqns:
            values = [Lifted(v.val, {}) if isinstance(v, _jax.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, values, given, counted, path, mask), strict=True))
        return [Lifted(v.val, {}) if isinstance(v, _jax.Literal) else env[v] for v in opened.outvars]

    def _equation(self, eqn: Any, values: list[Any], given: Choices, counted: Choices, path: str, mask: Any) -> Any:
        lost = next((v for v in values if isinstance(v, Lost)), None)
        if eqn.primitive is deterministic_p:
            if lost is None and not values[0].depends:
                self.deterministic[path + eqn.params["site"].address] = values[0].array
            return values
        if not has_sites(eqn):
            return [lost] * len(eqn.outvars) if lost else apply(eqn, values)
        if lost is not None:
            raise ControlFlowError(f"marginalize_discrete: the sites at {place_of(eqn)} depend on {lost.reason}.")
        if eqn.primitive is sample_p:
            return [self._site(eqn.params["site"], values, given, counted, path, mask)]
        inner = _jax.called_jaxpr(eqn)
        if (address := scope_address(eqn)) is not None:
            below = f"{path}{address}/"
            return self.run(inner, values, given.get(address, {}), counted.get(address, {}), below, mask)
        if inner is not None:
            return self.run(inner, values, given, counted, path, mask)
        if eqn.primitive in _jax.SCAN:
            from ._enumerate_scan import enumerate_scan

            return enumerate_scan(self, eqn, values, given, counted, path, mask)
        if (branches := branches_of(eqn)) is not None:
            return self._branches(branches, values, given, counted, path, mask)
        if eqn.primitive.name == "marginal":  # what has been summed out before is summed out with the rest
            self.hidden = self.hidden | {path + name for name in eqn.params["hidden"]}
            return self.run(eqn.params["jaxpr"], values, given, counted, path, mask)
        raise unfollowable(eqn)

    def _branches(
        self, branches: Any, values: list[Lifted], given: Choices, counted: Choices, path: str, mask: Any
    ) -> list[Lifted]:
        """Run all branches, with masks that may depend on summed sites, and select."""
        index, results = values[0], []
        for number, branch in enumerate(branches):
            taken = lifted(lambda i, n=number: clamped(i, len(branches)) == n, index)
            if mask is not None:
                taken = lifted(
                    lambda t, m: t & jnp.reshape(m, jnp.shape(m) + (1,) * (t.ndim - jnp.ndim(m))), taken, mask
                )
            operands = values[1:]
            if not taken.depends:  # else every branch is taken for some assignment, and is no hazard
                operands = [lifted(lambda t, x: guarded(t, [x])[0], taken, x) for x in operands]
            results.append(self.run(branch, operands, given, counted, path, taken))
        chosen = lambda i, *cases: select(clamped(i, len(branches)), list(cases))  # noqa: E731
        return [_lifted_or_lost(chosen, index, *cases) for cases in zip(*results, strict=True)]

    # --- sites ---

    def _site(
        self, site: Site, operands: list[Lifted], given: Choices, counted: Choices, path: str, mask: Any
    ) -> Lifted:
        here = path + site.address
        depends = _elements_of(site, operands)
        if here in self.hidden:
            number, value = self._all_values(site, operands, here)
            depends = merge(depends, value.depends)
        else:
            number, value = None, self._given(site, operands, given, here)
        if mask is not None:
            self._presence(site, here, mask, number is not None)
        mask = Lifted(jnp.asarray(True), {}) if mask is None else mask
        if "scale" in site.extras and (depends or number is not None):
            raise ControlFlowError(
                f"marginalize_discrete: {here!r} at {site.where} is scaled and depends on a choice that is summed out; a "
                "power of its density inside the sum is not the power of the sum."
            )
        count = counted.get(site.address, not site.fixed or self.count_fixed) if number is None else True

        def terms(value: Any, mask: Any, *operands: Any) -> tuple[Any, Any]:
            absent = 0.0 if number is None else -math.log(self.variables[number].num_values)
            return _terms(site, value, mask, operands, absent, count)

        (array, safe), _ = lift(terms, value, mask, *operands)
        where = f"site {here!r} at {site.where}"
        self.factors.append(make_factor(array, merge(depends, mask.depends), self.variables, where))
        if number is not None:
            return value
        unlifted = not depends and not mask.depends
        return Lifted(safe if unlifted else value.array, {})

    def _presence(self, site: Site, path: str, mask: Lifted, hidden: bool) -> None:
        """Remember in which lanes a choice is made; that may not depend on what is summed out."""
        if hidden or site.fixed:
            return
        if mask.depends:
            self.present[path] = Lost(f"whether {path!r} is made depends on a choice that is summed out")
            return
        shape = site.element_shape
        flags = jnp.broadcast_to(along_elements(mask.array, len(shape), jnp.ndim(mask.array)), shape)
        known = self.present.get(path)
        if not isinstance(known, Lost):
            self.present[path] = flags if known is None else flags | known

    def _all_values(self, site: Site, operands: list[Lifted], path: str) -> tuple[int, Lifted]:
        """Return a new variable, and all values of its elements at once."""
        bare, leaves, _ = site.split([_first(x) for x in operands])
        support = single_support(bare, leaves)
        if support is None or site.fixed:
            raise ControlFlowError(
                f"marginalize_discrete: {path!r} at {site.where} has no finite support that is known."
            )
        elements = site.element_shape
        number = self.variable(path, len(support), elements)
        spread = support.reshape(len(support), *(1 for _ in elements), *support.shape[1:])
        array = jnp.broadcast_to(jnp.asarray(spread, site.dtype), (len(support), *site.value_shape))
        return number, Lifted(array, {number: tuple(range(len(elements)))})

    def _given(self, site: Site, operands: list[Lifted], given: Choices, path: str) -> Lifted:
        """Return the value of a site that is not summed out."""
        if site.fixed:
            number = site.structure.num_leaves + site.extras.index("value")
            value = lifted(lambda *xs: site.split(xs)[2]["value"], *operands)
            if operands[number].depends:
                raise ControlFlowError(
                    f"marginalize_discrete: the data of {path!r} at {site.where} depend on a choice that is summed out."
                )
            return Lifted(_first(value), {})
        own = given[site.address]
        value = own.value if isinstance(own, (Observed, Masked)) else own
        record = value
        if self.mode != "score" and not isinstance(own, Observed):
            record = self._changed(site, operands, own, path)
            value = record if self.mode == "constrain" else own
        self.records[path] = record
        return Lifted(value, {})

    def _changed(self, site: Site, operands: list[Lifted], own: Any, path: str) -> Any:
        """Return a value in the other space; going in, the Jacobian is a factor. A site of two branches goes once."""
        if path in self.records:
            return self.records[path]
        if isinstance(own, Partial):
            raise ControlFlowError(
                f"marginalize_discrete: {path!r} at {site.where} has missing data; observe it wholly."
            )
        if not any(x.depends for x in operands):
            bare, leaves, _ = site.split([x.array for x in operands])
            visitor = constraining if self.mode == "constrain" else unconstraining
            visit = visitor.visit(bare, leaves, None, own, None)
            if self.mode == "constrain":
                self.factors.append(Factor(visit.log_weight - visit.log_density, {}))
            return visit.record
        if site.support is None:
            raise ControlFlowError(
                f"marginalize_discrete: the support of {path!r} at {site.where} may depend on a choice that is summed "
                "out. Give it fixed bounds."
            )
        bijection = bijection_onto(site, site.support)
        if self.mode == "unconstrain":
            return bijection.inv(own)
        value = bijection(own)
        self.factors.append(Factor(bijection.log_abs_det_jacobian(own, value), {}))
        return value


def _first(value: Lifted) -> Any:
    """Return a lifted value that is the same for every assignment."""
    return value.array[(0,) * len(value.depends)] if value.depends else value.array


def _terms(site: Site, value: Any, mask: Any, operands: Any, absent: float, count: Any) -> tuple[Any, Any]:
    """Return the log densities of a site's elements, and the value to go on with."""
    bare, leaves, extras = site.split(list(operands))
    one = lambda v, xs: density_in_support(bare.distribution(xs), v, bare.terms)  # noqa: E731
    log_density, safe = lanes_of(bare, one, value, leaves=leaves)
    if "scale" in extras:
        log_density = log_density * extras["scale"]
    present = along_elements(mask, jnp.ndim(log_density), jnp.ndim(mask))
    if "mask" in extras:
        present = present & extras["mask"]
    log_density = jnp.where(present, log_density, absent)
    if count is not True:
        log_density = jnp.where(jnp.asarray(count), log_density, 0.0)
    return log_density, safe


def lifted(function: Any, *inputs: Lifted) -> Lifted:
    """Apply a function of elementwise meaning (leading axes alike) to lifted values."""
    array, numbers = lift(function, *inputs)
    depends: Dependence = {}
    for x in inputs:
        depends = merge(depends, x.depends)
    assert sorted(depends) == numbers
    return Lifted(array, depends)


def _lifted_or_lost(function: Any, *inputs: Any) -> Any:
    lost = next((x for x in inputs if isinstance(x, Lost)), None)
    return lost if lost is not None else lifted(function, *inputs)


def apply(eqn: Any, values: list[Lifted]) -> list[Lifted]:
    """Run an equation without sites for every assignment."""
    if not any(v.depends for v in values):
        return [Lifted(x, {}) for x in _jax.bind(eqn, [v.array for v in values])]
    arrays, _ = lift(lambda *xs: _jax.bind(eqn, xs), *values)
    depends = flow(eqn, [v.depends for v in values])
    return [Lifted(array, d) for array, d in zip(arrays, depends, strict=True)]


def _elements_of(site: Site, operands: list[Lifted]) -> Dependence:
    """Return along which of a site's elements each variable runs that enters its distribution."""
    result: Dependence = {}
    event = _event_ndim(site)
    for j, operand in enumerate(operands):
        if operand.depends:
            own = jnp.shape(operand.array)[len(operand.depends) :]
            move = _batch_mover(site, j, own, event if j < site.structure.num_leaves else 0)
            result = merge(result, moved(operand.depends, move))
    return result


def _event_ndim(site: Site) -> int | None:
    """Return how many trailing axes of each parameter belong to one event, if it is the same for all of them."""
    d = site.distribution([None] * site.structure.num_leaves)
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    found = {constraint.event_dim for constraint in d.arg_constraints.values()}
    return found.pop() if len(found) == 1 else None


def _batch_mover(site: Site, j: int, shape: tuple[int, ...], event: int | None) -> Any:
    """Return where a site takes the axes of its j-th operand: lanes to lanes, batch axes to batch axes from the right."""
    to_lane = lane_mover(site.lanes, j, len(shape))
    own = [a for a in range(len(shape)) if to_lane(a) is None]
    mapped = sum(lane.dims[j] is not None for lane in site.lanes)
    elements, places = site.element_shape, {}
    if event is not None and len(own) == len(shape) - mapped:
        last = len(site.value_shape) - _value_event(site)  # one past the last batch axis of the innermost distribution
        batch = own[: len(own) - event]
        places = {a: last - len(batch) + n for n, a in enumerate(batch)}

    def move(a: int) -> int | None:
        axis = places.get(a, -1)
        inside = len(site.lanes) <= axis < len(elements) and elements[axis] == shape[a]
        return to_lane(a) if a not in places else axis if inside else None

    return move


def _value_event(site: Site) -> int:
    """Return how many trailing axes of the innermost distribution's value are its event."""
    d = site.distribution([None] * site.structure.num_leaves)
    while isinstance(d, (dist.Independent, dist.ExpandedDistribution)):
        d = d.base_dist
    return d.event_dim
