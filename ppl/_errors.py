"""Typed errors: each says what was given, what was expected, where in the user's file, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class ExpectaxError(Exception):
    """The base of every error that expectax raises on purpose."""


class AddressError(ExpectaxError, KeyError):
    """An address is unknown, missing, duplicated or malformed."""

    def __str__(self) -> str:
        """Return the message itself (`KeyError` would print its `repr`)."""
        return str(self.args[0]) if self.args else ""


class ShapeError(ExpectaxError, ValueError):
    """A value does not have the shape of its site."""


class SupportError(ExpectaxError, ValueError):
    """A value or a guide lies outside the support that its site allows."""


class DistributionError(ExpectaxError, TypeError):
    """`sample` was given something that is not a usable distribution."""


class ControlFlowError(ExpectaxError, NotImplementedError):
    """A sample site stands where no interpreter can follow it soundly."""


class OutsideModelError(ExpectaxError, RuntimeError):
    """`sample` ran outside a model."""


class StrategyError(ExpectaxError, ValueError):
    """A gradient strategy does not fit the distribution or the place of its site."""


class SoundnessError(StrategyError):
    """A gradient estimator would be biased: the objective jumps in a value that is differentiated through."""


class StorageError(ExpectaxError, ValueError):
    """A file is damaged, hostile, of another version or of another program."""


class NonFiniteError(ExpectaxError, FloatingPointError):
    """A computation met nan or inf; `result` holds all that was finished before."""

    def __init__(self, message: str, result: object = None):
        """Keep the finished part of the computation beside the message."""
        super().__init__(message)
        self.result = result


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known spelling, else the list of what is known."""
    known, name = sorted(known), str(name)
    lowered = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {lowered[close[0]]!r}?"
    return f" Known: {', '.join(map(repr, known)) or 'none'}."
