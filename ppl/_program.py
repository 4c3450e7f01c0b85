"""Models and bound programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from . import _jax
from ._choices import check_values
from ._compile import Fixed
from ._evaluate import Outcome, Visitor
from ._nested import Choices
from ._nesting import nest
from ._staging import as_data, check_key, scalar, stage
from ._trace import Trace, finish
from ._visitors import assessing, assessing_inside, generating, rebinding


@functools.partial(jax.tree_util.register_dataclass, data_fields=["_arrays"], meta_fields=["model", "_fixed"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """A model bound to its arguments: a measure over traces.

    Made by calling a model. Arrays and floats among the arguments are data (new values cost no compilation);
    integers and booleans (numpy's scalars too), strings and other objects are fixed parts of the program.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def line(x):
        ...     slope = ex.sample("slope", dist.Normal(0.0, 1.0))
        ...     return ex.sample("y", dist.Normal(slope * x, 0.1))
        >>> trace = line(jax.numpy.arange(3.0)).simulate(jax.random.key(0))
        >>> trace["y"].shape
        (3,)
    """

    model: Model
    _arrays: Any
    _fixed: Fixed

    @classmethod
    def bind(cls, model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """Bind a model; users call the model instead."""
        arrays, fixed = eqx.partition(as_data((args, kwargs)), eqx.is_array)
        return cls(model, arrays, Fixed(fixed))

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return eqx.combine(self._arrays, self._fixed.value)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return eqx.combine(self._arrays, self._fixed.value)[1]

    def simulate(self, key: PRNGKeyArray) -> Trace:
        r"""Run the program with random choices.

        Args:
            key: a typed key (`jax.random.key`).

        Returns:
            A trace whose `log_density` is $\log p(\text{choices})$.

        Raises:
            TypeError: the key is not a typed key.
            AddressError, ControlFlowError: the model is malformed.
        """
        return self.generate(key, {})[0]

    def propose(self, key: PRNGKeyArray) -> tuple[Choices, Float[Array, ""], Any]:
        r"""Run the program as a proposal.

        Args:
            key: a typed key.

        Returns:
            `(choices, log_density, retval)`: what was drawn, $\log q(\text{choices})$, and what the model returned.

        Raises:
            TypeError: the key is not a typed key.
        """
        trace = self.simulate(key)
        return trace.choices, trace.log_density, trace.retval

    def assess(self, choices: Choices, key: PRNGKeyArray | None = None) -> tuple[Float[Array, ""], Any]:
        r"""Score a full set of choices.

        Args:
            choices: nested dict with a value for every site; shapes must be those of the sites.
            key: a typed key, for a density that is only estimated (`vi.marginal`); others need none.

        Returns:
            `(log_density, retval)`; minus infinity outside the support.

        Raises:
            AddressError: an address is unknown or missing.
            DistributionError: the density is only estimated, and there is no key.
            ShapeError, SupportError: a value does not fit its site.
        """
        return self._assessed(choices, assessing, key)

    def assess_inside(self, choices: Choices) -> tuple[Float[Array, ""], Any]:
        """Score choices inside an objective, whose estimator draws what an estimated density needs."""
        return self._assessed(choices, assessing_inside)

    def _assessed(self, choices: Choices, visitor: Visitor, key: Any = None) -> tuple[Float[Array, ""], Any]:
        if key is not None:
            check_key(key)
        staged = stage(self)
        given = check_values(staged.table, choices, "assess", _jax.caller(), complete=True)
        outcome = staged.run(visitor, key, given)
        return scalar(outcome.log_density), staged.returned(outcome.outputs)

    def generate(self, key: PRNGKeyArray, constraints: Choices) -> tuple[Trace, Float[Array, ""]]:
        r"""Run the program with some choices given and the others drawn from the prior.

        Args:
            key: a typed key.
            constraints: nested dict of the given values.

        Returns:
            `(trace, log_weight)`, the weight being $\log p(x, z) - \log q(z)$ with $q$ the prior of the drawn choices
            along the run: the sum of the given sites' log densities. $E[e^{w}]$ is the evidence of the constraints.

        Raises:
            AddressError: an address is unknown.
            ShapeError, SupportError: a value does not fit its site.
        """
        check_key(key)
        staged = stage(self)
        given = check_values(staged.table, constraints, "generate", _jax.caller())
        outcome = staged.run(generating, key, given)
        return finish(self, staged, outcome), scalar(outcome.log_weight)

    def given(self, observations: Choices) -> Any:
        """Condition on observations; see `Posterior`.

        Raises:
            AddressError: an observation names no site (the nearest address is named).
            ShapeError: its shape is not exactly the site's; expectax never broadcasts an observation.
            SupportError: it lies outside the site's support.
        """
        from ._posterior import Posterior

        staged = stage(self)
        return Posterior(self, check_values(staged.table, observations, "given", _jax.caller()))

    def rebind(self, given: Choices | None = None) -> Outcome:
        """Run the program inside an objective, leaving the choices that are not given to the objective's estimator."""
        staged = stage(self)
        outcome = staged.run(rebinding, None, given)
        return outcome._replace(log_density=scalar(outcome.log_density), log_weight=scalar(outcome.log_weight))

    def sites(self) -> Choices:
        """Return the nested dict of address to entry (shape, dtype, distribution, place) of the choices."""
        return stage(self).sites

    def table(self) -> Choices:
        """Return the nested dict of entries of the choices, of what the program observes, and of what it records."""
        return stage(self).table

    def __repr__(self) -> str:
        """Show the model and the shapes of its arguments."""
        shown = [_shown(a) for a in self.args] + [f"{k}={_shown(v)}" for k, v in self.kwargs.items()]
        return f"<program {getattr(self.model, '__name__', '?')}({', '.join(shown)})>"

    def _nest(self, address: str) -> Any:
        return nest(address, functools.partial(self.model.function, *self.args, **self.kwargs))


def bound_program(program: Any, what: str) -> Program:
    """Return a bound program; refuse anything else, also a posterior, whose observations would be lost."""
    if not isinstance(program, Program):
        raise TypeError(f"{what} at {_jax.caller()} takes a bound program, model(arguments), got {program!r}.")
    return program


def program_of(target: Any, what: str) -> Program:
    """Return the bound program of a program or posterior; refuse anything else."""
    return bound_program(getattr(target, "program", target), what)


def _shown(argument: Any) -> str:
    return repr(argument) if isinstance(argument, Program) else eqx.tree_pformat(argument)


class Model:
    """A function with sample sites; calling it binds it to arguments. Made by `expectax.model`.

    Example: see `expectax.model`.
    """

    def __init__(self, function: Callable[..., Any]):
        """Wrap a function."""
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Program:
        """Bind the model to its arguments."""
        return Program.bind(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Say what to do when a program's method is asked of the model."""
        if name in ("simulate", "assess", "generate", "given", "sites"):
            raise AttributeError(f"{self!r} is not bound to its arguments yet: write model(...).{name}(...).")
        raise AttributeError(f"a model has no attribute {name!r}.")

    def _state(self) -> Any:
        """What a compiled program depends on; see `_compile`."""
        return self.function

    def __repr__(self) -> str:
        """Show the model by its name."""
        return f"<model {getattr(self, '__name__', '?')}>"

    def __reduce__(self) -> Any:
        """Pickle a model by its name, as functions are."""
        return getattr(self, "__qualname__", None) or super().__reduce__()


def model(function: Callable[..., Any]) -> Model:
    """Turn a Python/JAX function with `sample` sites into a model.

    Args:
        function: any function of arrays and static values; inside, `jax.vmap`, `lax.scan`, `jax.jit` and calls of
            other models (`sample("address", other(args))`) are plain JAX.

    Returns:
        A `Model`; `model(*args)` is a `Program`.

    Raises:
        TypeError: `function` is none.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist
        >>> @ex.model
        ... def pair():
        ...     return jax.vmap(lambda m: ex.sample("x", dist.Normal(m, 1.0)))(jax.numpy.array([0.0, 5.0]))
        >>> pair().simulate(jax.random.key(0)).choices["x"].shape
        (2,)
    """
    if not callable(function):
        raise TypeError(f"model at {_jax.caller()}: expected a function of a model's arguments, got {function!r}.")
    return Model(function)
