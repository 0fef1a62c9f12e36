"""Operations of timm's RandAugment that give PIL's pixels in a fraction of PIL's time.

PIL's bicubic samples every shear and translation over 4 × 4 pixels, though they move pixels along one axis only; and it
blends brightness and contrast with a second image, though every pixel's new value follows from its old one alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

Operation = Callable[..., Image.Image]


def shear_x(image: Image.Image, factor: float, **options: object) -> Image.Image:
    """Move row y by `factor` × (y + 0.5) pixels to the left."""
    return _move(image, factor, 0.0, axis=1, **options)


def shear_y(image: Image.Image, factor: float, **options: object) -> Image.Image:
    """Move column x by `factor` × (x + 0.5) pixels upwards."""
    return _move(image, factor, 0.0, axis=0, **options)


def translate_x_rel(image: Image.Image, pct: float, **options: object) -> Image.Image:
    """Move the image by the share `pct` of its width to the left."""
    return _move(image, 0.0, pct * image.width, axis=1, **options)


def translate_y_rel(image: Image.Image, pct: float, **options: object) -> Image.Image:
    """Move the image by the share `pct` of its height upwards."""
    return _move(image, 0.0, pct * image.height, axis=0, **options)


def brightness(image: Image.Image, factor: float, **_: object) -> Image.Image:
    """Blend with black: `factor` 0 is black, 1 changes nothing."""
    return _blend(image, 0, factor)


def contrast(image: Image.Image, factor: float, **_: object) -> Image.Image:
    """Blend with the mean of the image's grey values: `factor` 0 is that grey, 1 changes nothing."""
    return _blend(image, int(np.asarray(image.convert("L")).mean() + 0.5), factor)


# timm's operation -> the faster one
FASTER: dict[Operation, Operation] = {
    getattr(auto_augment, operation.__name__): operation
    for operation in (shear_x, shear_y, translate_x_rel, translate_y_rel, brightness, contrast)
}


def _blend(image: Image.Image, grey: int, factor: float) -> Image.Image:
    values = np.arange(256, dtype=np.float32)
    blended = (grey + np.float32(factor) * (values - grey)).clip(0, 255).astype(np.uint8)
    return image.point(blended.tolist() * len(image.getbands()))


def _move(
    image: Image.Image,
    slope: float,
    offset: float,
    *,
    axis: int,
    fillcolor: tuple[int, int, int],
    resample: Image.Resampling | tuple[Image.Resampling, ...],
) -> Image.Image:
    """Move line i, a row for axis 1 and a column for axis 0, by slope × (i + 0.5) + offset pixels along itself.

    Args:
        image: In mode RGB.
        slope: Of a shear.
        offset: Of a translation, in pixels towards the line's beginning.
        axis: Along which pixels move.
        fillcolor: Of what moves in from outside.
        resample: The interpolation, or several to draw one from.
    """
    if isinstance(resample, tuple):
        resample = random.choice(resample)
    if resample != Image.Resampling.BICUBIC:  # PIL's others are fast
        matrix = (1, slope, offset, 0, 1, 0) if axis == 1 else (1, 0, 0, slope, 1, offset)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fillcolor)
    pixels = np.asarray(image)
    length, num_lines = pixels.shape[axis], pixels.shape[1 - axis]
    shifts = slope * (np.arange(num_lines) + 0.5) + offset

    # pixel x of a line comes from the four around x + shift: from x + whole - 1 to x + whole + 2
    whole = np.floor(shifts).astype(np.int64)
    before, after = max(0, 1 - int(whole.min())), max(0, int(whole.max()) + 2)
    padded = np.pad(pixels, [(before, after) if i == axis else (0, 0) for i in range(3)], mode="edge")
    sources = np.empty([size + 3 if i == axis else size for i, size in enumerate(pixels.shape)], np.uint8)
    ends = [*(np.flatnonzero(np.diff(whole)) + 1).tolist(), num_lines]
    for first, end in zip([0, *ends], ends, strict=False):  # neighbours that move by the same number of whole pixels
        start = before + int(whole[first]) - 1
        if axis == 1:
            sources[first:end] = padded[first:end, start:start + length + 3]
        else:
            sources[:, first:end] = padded[start:start + length + 3, first:end]

    values = torch.from_numpy(sources).float()
    weights = torch.from_numpy(_cubic_weights(shifts - whole)).float().unsqueeze(axis + 1).unsqueeze(-1)
    if axis == 0:
        weights = weights.repeat(1, 1, 1, 3)  # else torch's innermost loop is over the three channels, and slow
    blend = values.narrow(axis, 0, length) * weights[0]
    for tap in (1, 2, 3):
        blend.addcmul_(values.narrow(axis, tap, length), weights[tap])
    # what is behind the point is cut off, as PIL does: sums just below a whole number would darken flat areas
    moved = blend.add_(2**-14).clamp_(0, 255).to(torch.uint8).numpy()

    centres = np.expand_dims(np.arange(length) + 0.5, 1 - axis) + np.expand_dims(shifts, axis)
    moved[(centres < 0) | (centres >= length)] = fillcolor
    return Image.fromarray(moved)


def _cubic_weights(fraction: np.ndarray) -> np.ndarray:
    """PIL's weights (4, lines) of the pixels at -1, 0, 1 and 2 for points at a fraction in [0, 1)."""
    d = fraction
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2])
