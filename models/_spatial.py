r"""A spatial transformer: paste a window into a canvas and crop it out again, at a scale and place.

A place is `(s, x, y)`: the canvas, with coordinates from -1 to 1, is mapped to the window by $u \mapsto s u + (x, y)$, so
that the window takes $1/s$ of the canvas in each direction. Interpolation is linear, $\max(0, 1 - |\text{distance}|)$
in pixels: continuous in the place, and separable, so that pasting is two small matrix products.

Source: M. Jaderberg et al., Spatial transformer networks, NeurIPS 2015, section 3.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def paste(
    window: Float[Array, "window window"], place: Float[Array, " 3"], canvas: int
) -> Float[Array, "canvas canvas"]:
    """Return a canvas with a window pasted into it at a place, and zeros around.

    Args:
        window: pixels.
        place: scale, and shift to the right and down, see the module.
        canvas: height and width of the canvas in pixels.

    Source: Jaderberg et al. 2015, equation 5.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax.models import paste
        >>> paste(jnp.ones((3, 3)), jnp.array([2.0, 0.0, 0.0]), 5).tolist()[2]  # the middle half of a row
        [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    columns, rows = _weights(place[0] * jnp.linspace(-1.0, 1.0, canvas) + place[1:, None], window.shape[0])
    return rows @ window @ columns.T


def crop(
    canvas: Float[Array, "canvas canvas"], place: Float[Array, " 3"], window: int
) -> Float[Array, "window window"]:
    """Return the window of a canvas at a place: what `paste` would have put there.

    Args:
        canvas: pixels.
        place: scale, and shift to the right and down, see the module.
        window: height and width of the window in pixels.

    Source: Jaderberg et al. 2015, equation 5.

    Example:
        >>> import jax.numpy as jnp
        >>> from expectax.models import crop, paste
        >>> place = jnp.array([2.0, 0.5, -0.5])
        >>> crop(paste(jnp.ones((3, 3)), place, 9), place, 3).tolist()[1]
        [1.0, 1.0, 1.0]
    """
    columns, rows = _weights((jnp.linspace(-1.0, 1.0, window) - place[1:, None]) / place[0], canvas.shape[0])
    return rows @ canvas @ columns.T


def _weights(coordinates: Float[Array, "2 coordinates"], size: int) -> Float[Array, "2 coordinates size"]:
    """Return how much of each of `size` pixels is seen at each coordinate, across and down."""
    positions = (coordinates + 1.0) / 2.0 * (size - 1)
    return jax.nn.relu(1.0 - jnp.abs(positions[..., None] - jnp.arange(size)))
