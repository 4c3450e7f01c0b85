r"""Equinox's networks, applied so that a batch of inputs is a matrix with the batch as its rows.

Equinox writes $W x$, we write $x W^\top$. The numbers are the same, but under `jax.vmap` and a derivative XLA takes the
products in another order, and a network on a batch of a thousand is faster by some per cent.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def affine(layer: eqx.nn.Linear, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """Return $x W^T + b$."""
    assert layer.bias is not None
    return x @ layer.weight.T + layer.bias


def mlp(network: eqx.nn.MLP, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """Return the outputs of affine layers with an activation, the same function for all units, after each."""
    *hidden, last = network.layers
    for layer in hidden:
        x = network.activation(affine(layer, x))
    return network.final_activation(affine(last, x))


def lstm(cell: eqx.nn.LSTMCell, x: Float[Array, " inputs"], state: tuple[Array, Array]) -> tuple[Array, Array]:
    r"""Return the next hidden state and memory of an LSTM: $c' = f c + i g$, $h' = o \tanh c'$."""
    hidden, memory = state
    assert cell.bias is not None
    pre = x @ cell.weight_ih.T + hidden @ cell.weight_hh.T + cell.bias
    _, _, g, _ = jnp.split(jnp.tanh(pre), 4)
    i, f, _, o = jnp.split(jax.nn.sigmoid(pre), 4)  # all four by one call: cheaper than three calls to compile
    memory = f * memory + i * g
    return o * jnp.tanh(memory), memory
