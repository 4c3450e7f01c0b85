r"""Keyless programs: functions whose random choices are sites, in no model; and how to run one with a key.

An inference algorithm that is written so has its randomness in the open: with a key it runs (`keyed`), and when all of its
choices are finite they can be enumerated, which gives its exact law.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro import distributions as dist
from numpyro.distributions import constraints

from ._evaluate import evaluate
from ._sample import sample
from ._staging import staging_once
from ._visitors import generating


def opened(function: Callable[..., Any], *args: Any) -> tuple[Any, list[Any], Callable[[list[Any]], Any]]:
    """Return a keyless program as equations: the jaxpr, the arrays that it takes, and how to rebuild what it returns."""
    arrays, rest = eqx.partition(args, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    box: list[Any] = []

    def run(*leaves: Any) -> list[Any]:
        result = function(*eqx.combine(jax.tree.unflatten(structure, leaves), rest))
        arrays, static = eqx.partition(result, eqx.is_array)
        flat, tree = jax.tree.flatten(arrays)
        box.append((tree, static))
        return flat

    with staging_once():
        jaxpr = jax.make_jaxpr(run)(*leaves)
    tree, static = box[-1]
    return jaxpr, leaves, lambda outputs: eqx.combine(jax.tree.unflatten(tree, outputs), static)


def keyed(function: Callable[..., Any]) -> Callable[..., Any]:
    r"""Turn a keyless program into a function of a key.

    Args:
        function: any function of arrays with `expectax.sample` sites inside; addresses may repeat.

    Returns:
        `run(key, *args)`, plain JAX: to be put under `jax.jit`, `jax.vmap` or `lax.scan`.

    Example:
        >>> import jax, expectax as ex
        >>> from expectax import dist, inference
        >>> def walk(x, num_steps):
        ...     for _ in range(num_steps):
        ...         x = x + ex.sample("step", dist.Normal(0.0, 1.0))
        ...     return x
        >>> inference.keyed(walk)(jax.random.key(0), 0.0, 3).shape
        ()
    """

    def run(key: Any, *args: Any) -> Any:
        jaxpr, leaves, rebuilt = opened(function, *args)
        return rebuilt(evaluate(jaxpr, leaves, generating, key).outputs)

    return run


class RandomKey(dist.Distribution):
    """The data of a uniformly random JAX key."""

    def __init__(self) -> None:
        """Take the number of words from JAX's default generator."""
        words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        super().__init__(batch_shape=(), event_shape=words, validate_args=False)

    @property
    def support(self) -> Any:
        """Any words."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw random bits."""
        return jax.random.bits(key, sample_shape + self.event_shape, jnp.uint32)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Return 0: the density with respect to the uniform law."""
        del intermediates
        return jnp.zeros(jnp.shape(value)[: jnp.ndim(value) - 1])


def random_key(address: str = "key") -> Any:
    """Draw a typed key in a keyless program, for a function that takes one; it has no finite support to enumerate.

    Example:
        >>> import jax
        >>> from expectax import inference
        >>> def noise():
        ...     return jax.random.normal(inference.random_key(), (3,))
        >>> inference.keyed(noise)(jax.random.key(0)).shape
        (3,)
    """
    return jax.random.wrap_key_data(sample(address, RandomKey()))
