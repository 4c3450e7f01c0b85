"""Choosing the gradient strategies of a guide from outside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from expectax.ppl import AddressError, Program, StrategyError, _jax, model
from expectax.ppl._errors import nearest
from expectax.ppl._nested import leaves_of
from expectax.ppl._rewrite import Place, rewritten
from expectax.ppl._sample import apart

from ._strategy import Coupled, Enum, Reinforce, Reparam, Strategy


def with_gradients(guide: Any, strategies: Mapping[str, Strategy]) -> Any:
    """Return a guide with other gradient strategies at some of its sites, all else being as it was.

    Args:
        guide: a bound program, or a function (a model, an amortised guide) that returns one.
        strategies: path to strategy, such as `{"z": vi.MVD(), "sub/b": vi.Enum()}`. None restores the default.

    Returns:
        A program, or a function that returns one.

    Raises:
        AddressError: a path names no site of the guide (the nearest is named); for a function, when it is called.
        StrategyError: what is given is no strategy, or one that changes the dtype of the value (`GumbelSoftmax`,
            `StraightThrough`, `Rebar`), which has to stand at the site itself.

    Example:
        >>> import expectax as ex
        >>> from expectax import dist, vi
        >>> @ex.model
        ... def guide(p):
        ...     ex.sample("b", dist.Bernoulli(p))
        >>> ex.shapes(vi.with_gradients(guide, {"b": vi.MVD()})(0.3))["b"]["gradient"]
        'MVD()'
    """
    where = _jax.caller()
    for address, strategy in strategies.items():
        _check(address, strategy, where)
    if not isinstance(guide, Program):
        if not callable(guide):
            raise TypeError(f"with_gradients at {where} takes a bound program or a function of one, got {guide!r}.")
        return _lifted(guide, strategies, where)
    known = dict(leaves_of(guide.sites()))
    for address in strategies:
        if address not in known:
            raise AddressError(f"with_gradients at {where}: there is no site {address!r}.{nearest(address, known)}")
        if known[address].joint:
            raise StrategyError(
                f"with_gradients at {where}: {address!r} has a density that is estimated or summed. Give the strategy to the "
                "program that vi.marginal or vi.normalize is made of."
            )
    parts = {address: apart(strategy) for address, strategy in strategies.items()}
    static = tuple((address, strategy) for address, (strategy, _) in parts.items())
    baselines = {address: baseline for address, (_, baseline) in parts.items() if baseline is not None}
    return _with_gradients(guide, _Strategies(static), baselines)


def _lifted(guide: Callable[..., Any], strategies: Any, where: str) -> Callable[..., Any]:
    def changed(*args: Any, **kwargs: Any) -> Program:
        program = guide(*args, **kwargs)
        if not isinstance(program, Program):
            raise TypeError(f"with_gradients at {where}: the guide returned {program!r}, not a bound program.")
        return with_gradients(program, strategies)

    return functools.wraps(getattr(guide, "function", guide))(changed)


def _check(address: str, strategy: Strategy, where: str) -> None:
    if strategy is None:
        return
    if not isinstance(strategy, (Reparam, Reinforce, Enum, Coupled)):
        raise StrategyError(f"with_gradients at {where}: {strategy!r}, for {address!r}, is no gradient strategy.")
    if getattr(strategy, "relaxed", False):
        raise StrategyError(
            f"with_gradients at {where}: {strategy!r} makes the value of {address!r} a float, which the program would "
            "not expect. Give it at the site: sample(..., gradient=...)."
        )


class _Strategies(tuple):
    """Pairs of path and strategy, a fixed part of the program."""


@model
def _with_gradients(program: Program, strategies: _Strategies, baselines: dict[str, Any]) -> Any:
    wanted = dict(strategies)

    def rule(place: Place) -> Any:
        if place.path not in wanted:
            return place.bind()
        return place.bind(gradient=wanted[place.path], baseline=baselines.get(place.path))

    return rewritten(program, rule)
