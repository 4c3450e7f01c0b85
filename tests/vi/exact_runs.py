"""All runs of a keyless program with finite choices, with their probabilities: the gold standard for estimates."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expectax.ppl import _jax
from expectax.ppl._finite import single_support
from expectax.ppl._nesting import scope_address
from expectax.ppl._sample import sample_p
from expectax.vi._flat import flatten


def all_runs(function: Any) -> tuple[np.ndarray, Any]:
    """Return `(probabilities, outputs)` over all runs of `function()`, a keyless program of scalars; loops written out."""
    shape: list[Any] = []

    def run() -> Any:
        leaves, structure = jax.tree.flatten(function())
        shape.append(structure)
        value = jnp.zeros(())
        return [value, *map(jnp.asarray, leaves)]

    jaxpr = jax.make_jaxpr(run)()
    flat, _ = flatten(jaxpr, [], frozenset(paths(jaxpr, "")))
    sites = [eqn for eqn in flat.jaxpr.eqns if eqn.primitive is sample_p]
    supports = [support_of(eqn) for eqn in sites]
    counts = [int(np.prod(eqn.params["site"].element_shape)) for eqn in sites]
    columns = [values for values, count in zip(supports, counts, strict=True) for _ in range(count)]
    rows = np.array(list(itertools.product(*(range(len(c)) for c in columns))), int)
    rows = rows.reshape(len(rows), len(columns))

    def one(row: Any) -> Any:
        env, total, at = _jax.Environment.of(flat, []), jnp.zeros(()), 0
        choice = iter(zip(sites, supports, counts, strict=True))
        for eqn in flat.jaxpr.eqns:
            inputs = [env.read(v) for v in eqn.invars]
            if eqn.primitive is not sample_p:
                env.update(zip(eqn.outvars, _jax.bind(eqn, inputs), strict=True))
                continue
            _, support, count = next(choice)
            site, leaves, extras = eqn.params["site"].split(inputs)
            value = jnp.asarray(support)[row[at : at + count]].reshape(site.value_shape).astype(site.dtype)
            at += count
            own = site.log_density(value, leaves)
            if "mask" in extras:  # of what does not count, one value stands for all
                first = value == jnp.asarray(support[0], site.dtype)
                own = jnp.where(extras["mask"], own, jnp.where(first, 0.0, -jnp.inf))
            total = total + jnp.sum(own)
            env[eqn.outvars[0]] = value
        return total, [env.read(v) for v in flat.jaxpr.outvars[1:]]

    totals, outputs = jax.jit(jax.vmap(one))(rows)
    return np.exp(totals), jax.tree.unflatten(shape[-1], [np.asarray(x) for x in outputs])


def support_of(eqn: Any) -> np.ndarray:
    site = eqn.params["site"]
    count = site.structure.num_leaves
    leaves = [
        v.val if isinstance(v, _jax.Literal) else jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.invars[:count]
    ]
    values = single_support(site.bare, leaves)
    assert values is not None, site.address
    return values


def paths(jaxpr: Any, scope: str) -> Any:
    for eqn in _jax.close(jaxpr)[0].eqns:
        if eqn.primitive is sample_p:
            yield scope + eqn.params["site"].address
        address = scope_address(eqn)
        for inner in _jax.sub_jaxprs(eqn):
            yield from paths(inner, scope if address is None else f"{scope}{address}/")
