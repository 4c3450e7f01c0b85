r"""The layout of a flat objective: its random choices, numbered, and which values depend on which of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from expectax.ppl import _jax
from expectax.ppl._distribution import CATEGORICAL, ELEMENTWISE
from expectax.ppl._draw import lane_types
from expectax.ppl._flow import Axes, Dependence, flow, lane_mover, merge, moved, of
from expectax.ppl._flow_scan import flow_scan
from expectax.ppl._sample import Site, sample_p

from ._strategy import Enum, Reinforce, Strategy, pathwise
from ._terms import Terms

MAX_ENUMERATED = 4096
"""The most runs of an objective that `Enum` sites may take together."""

SMALL_SUPPORT = 64
"""By default a site is enumerated only if that takes at most so many runs."""


class Loop(NamedTuple):
    """An enclosing scan."""

    length: int
    reverse: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A random choice of an objective: its number, its site without extras, its strategy, the loops around it.

    `types` are the parameters' shapes and dtypes in one lane.
    `element_shape` is that of its scores: steps of the loops (outermost first), lanes, batch. `mode` says how an
    enumerated choice is: by `"lanes"`, `"jointly"`, or `"locally"`; `why` it has its strategy, in words.
    """

    number: int
    site: Site
    strategy: Strategy
    loops: tuple[Loop, ...]
    types: tuple[Any, ...] = ()
    mode: str | None = None
    why: str = ""

    @property
    def element_shape(self) -> tuple[int, ...]:
        """The shape of the choice's independent elements, steps first."""
        return tuple(loop.length for loop in self.loops) + self.site.element_shape

    @property
    def place(self) -> str:
        """Where the choice stands, for messages."""
        return f"site {self.site.address!r} at {self.site.where}"


class Layout:
    """The choices of a flat jaxpr and the dependence of its values on them; reparametrised ones need none."""

    def __init__(self, jaxpr: Any, reasons: Mapping[str, str]):
        """Number the choices, then follow their values through the equations; `reasons` of strategies by address."""
        self.jaxpr, self._reasons = jaxpr, reasons
        self.choices: list[Choice] = []
        self._of_equation: dict[int, int] = {}
        self._inside: dict[int, list[int]] = {}
        self._number(jaxpr, ())
        self.depends: dict[Any, Dependence] = {}
        for eqn in jaxpr.eqns:
            outputs = self._flow(eqn, [of(self.depends, v) for v in eqn.invars])
            self.depends.update((v, d) for v, d in zip(eqn.outvars, outputs, strict=True) if d)
        self.terms = Terms(jaxpr, self.depends)
        self._choose_enumerations()

    def axes(self, choice: Choice) -> list[Axes]:
        """Return how the elements of a choice run along each term that depends on it."""
        found = (self.depends[v].get(choice.number) for v in self.terms.variables)
        return [axes for axes in found if axes is not None]

    def mixed(self, choice: Choice) -> list[int]:
        """Return the axes of a choice's elements that some term mixes: a term sees several steps, lanes, ..."""
        exact = [
            [isinstance(axis, int) and axis not in axes[:n] for n, axis in enumerate(axes)]
            for axes in self.axes(choice)
        ]
        return [n for n in range(len(choice.element_shape)) if not all(e[n] for e in exact)]

    def _choose_enumerations(self) -> None:
        runs = 1
        for n, choice in enumerate(self.choices):
            if not isinstance(choice.strategy, Enum):
                continue
            if math.prod(choice.element_shape) == 0:
                self.choices[n] = dataclasses.replace(choice, strategy=Reinforce(), why="it has no elements")
                continue
            mode, size = enumeration(choice, bool(self.mixed(choice)), runs)
            runs *= size
            if mode is None:
                why = f"default: enumerating it would take more than {SMALL_SUPPORT} runs"
                self.choices[n] = dataclasses.replace(choice, strategy=Reinforce(), why=why)
            else:
                self.choices[n] = dataclasses.replace(choice, mode=mode)

    def choice(self, eqn: Any) -> Choice:
        """Return the choice that an equation makes."""
        return self.choices[self._of_equation[id(eqn)]]

    def numbers(self, eqn: Any) -> list[int]:
        """Return the numbers of the choices that an equation makes: its own, or those in a loop."""
        own = self._of_equation.get(id(eqn))
        return self._inside.get(id(eqn), []) if own is None else [own]

    def holds(self, eqn: Any) -> bool:
        """Tell whether there are choices in an equation."""
        return id(eqn) in self._inside

    def _number(self, jaxpr: Any, loops: tuple[Loop, ...]) -> None:
        for eqn in _jax.close(jaxpr)[0].eqns:
            if eqn.primitive is sample_p:
                site = eqn.params["site"].bare
                why = self._reasons.get(site.address, "")
                types = lane_types(site.lanes, [v.aval for v in eqn.invars[: site.structure.num_leaves]])
                choice = Choice(len(self.choices), site, site.gradient, loops, tuple(types), why=why)
                self._of_equation[id(eqn)] = choice.number
                self.choices.append(choice)
            elif _jax.holds(eqn, sample_p):
                before = len(self.choices)
                loop = Loop(eqn.params["length"], bool(eqn.params["reverse"]))
                self._number(eqn.params["jaxpr"], (*loops, loop))
                self._inside[id(eqn)] = list(range(before, len(self.choices)))

    def _flow(self, eqn: Any, inputs: list[Dependence]) -> list[Dependence]:
        if eqn.primitive is sample_p:
            return [self._at_site(self.choice(eqn), eqn, inputs)]
        if eqn.primitive in _jax.SCAN and self.holds(eqn):
            return flow_scan(eqn, inputs, self._flow)
        return flow(eqn, inputs, loops=True)

    def _at_site(self, choice: Choice, eqn: Any, inputs: list[Dependence]) -> Dependence:
        """A draw depends on what its parameters depend on, lane by lane, and on itself, element by element."""
        result: Dependence = {}
        site = choice.site
        for j in range(site.structure.num_leaves):
            result = merge(result, moved(inputs[j], parameter_mover(site, j, eqn.invars[j].aval.shape)))
        if pathwise(choice.strategy):
            return result
        steps = range(-len(choice.loops), 0)
        own: Dependence = {choice.number: (*steps, *range(len(site.element_shape)))}
        return merge(result, own)  # by a loop's carry it may depend on itself at earlier steps


def enumeration(choice: Choice, mixed: bool, runs: int) -> tuple[str | None, int]:
    """Return how to enumerate a choice, and how many runs that takes; `runs` are those of the choices before.

    None: a choice that need not be enumerated would take too many.
    """
    strategy, elements = choice.strategy, math.prod(choice.element_shape)
    size, limit = strategy.size, MAX_ENUMERATED if strategy.asked else SMALL_SUPPORT
    if elements != 1 and not mixed and size * runs <= limit:
        return "lanes", size
    if elements < 64 and size**elements * runs <= limit:
        return "jointly", size**elements
    return ("locally", 1) if strategy.asked else (None, 1)


def parameter_mover(site: Site, j: int, shape: tuple[int, ...]) -> Callable[[int], int | None]:
    """Return where a site takes the axes of its `j`-th parameter: lanes to lanes, and batch to batch where known."""
    by_lane = lane_mover(site.lanes, j, len(shape))
    own = [a for a in range(len(shape)) if by_lane(a) is None]
    d = site.distribution([None] * site.structure.num_leaves)
    last = 1 if type(d) in CATEGORICAL else 0  # the categories
    if type(d) not in ELEMENTWISE and not last:
        return by_lane
    batch = len(site.shape) - d.event_dim
    found = {a: len(site.lanes) + batch - (len(own) - last) + n for n, a in enumerate(own[: len(own) - last])}
    return lambda a: by_lane(a) if a not in found or shape[a] != site.value_shape[found[a]] else found[a]
