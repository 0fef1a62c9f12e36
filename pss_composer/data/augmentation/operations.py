"""Operations of timm's RandAugment that give PIL's pixels several times as fast as PIL.

PIL's bicubic interpolation reads 4 × 4 pixels for every pixel of a shear or a translation, although these move pixels
along one axis only. For brightness and contrast PIL blends with a second image, although a table of 256 values is
enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

Operation = Callable[..., Image.Image]


def shear_x(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    """Move row y by `factor` × (y + 0.5) pixels to the left."""
    return _move_rows(image, factor, 0.0, **options)


def shear_y(image: Image.Image, factor: float, **options: Any) -> Image.Image:
    """Move column x by `factor` × (x + 0.5) pixels upwards."""
    return _transpose(_move_rows(_transpose(image), factor, 0.0, **options))


def translate_x_rel(image: Image.Image, pct: float, **options: Any) -> Image.Image:
    """Move the image by the share `pct` of its width to the left."""
    return _move_rows(image, 0.0, pct * image.width, **options)


def translate_y_rel(image: Image.Image, pct: float, **options: Any) -> Image.Image:
    """Move the image by the share `pct` of its height upwards."""
    return _transpose(_move_rows(_transpose(image), 0.0, pct * image.height, **options))


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


def _transpose(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.TRANSPOSE)


def _move_rows(
    image: Image.Image,
    slope: float,
    offset: float,
    *,
    fillcolor: tuple[int, int, int],
    resample: Image.Resampling | tuple[Image.Resampling, ...],
) -> Image.Image:
    """Move row y by slope × (y + 0.5) + offset pixels to the left; the pixels are those of PIL's affine transform.

    Args:
        image: In mode RGB.
        slope: Of a shear.
        offset: Of a translation.
        fillcolor: Of the pixels that move in from outside.
        resample: The interpolation, or several to draw one from.
    """
    if isinstance(resample, tuple):
        resample = random.choice(resample)
    if resample != Image.Resampling.BICUBIC:  # PIL's others are fast
        matrix = (1, slope, offset, 0, 1, 0)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fillcolor)
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    shifts = slope * (np.arange(height) + 0.5) + offset

    # pixel x of a row comes from the four around x + shift: those of a window that begins at x + whole - 1
    whole = np.floor(shifts).astype(np.int64)
    before, after = max(0, 1 - int(whole.min())), max(0, int(whole.max()) + 2)
    padded = np.empty((height, before + width + after, 3), np.uint8)
    padded[:, :before] = pixels[:, :1]
    padded[:, before:before + width] = pixels
    padded[:, before + width:] = pixels[:, -1:]
    # now a row is a line of bytes, three per pixel: view every window of every row, then take one window per row
    shape = (height, before + after - 2, 3 * (width + 3))
    windows = np.lib.stride_tricks.as_strided(padded, shape, (padded.strides[0], 3, 1))
    values = torch.from_numpy(windows[np.arange(height), before + whole - 1]).float()

    weights = torch.from_numpy(_cubic_weights(shifts - whole)).float().unsqueeze(-1)
    blend = values[:, :3 * width] * weights[0]
    for tap in (1, 2, 3):
        blend.addcmul_(values[:, 3 * tap:3 * (tap + width)], weights[tap])
    # the conversion truncates, as PIL does; without 2**-14, sums just below a whole number would darken flat areas
    moved = blend.add_(2**-14).clamp_(0, 255).to(torch.uint8).numpy()

    # fill the pixels that come from outside, at the left end of a row (before `begin`) or at the right (from `end` on)
    fill = np.tile(np.array(fillcolor, np.uint8), width)
    begin = 3 * np.ceil(-0.5 - shifts).clip(0, width)[:, None]
    end = 3 * np.ceil(width - 0.5 - shifts).clip(0, width)[:, None]
    places = np.arange(3 * width)
    left, right = slice(int(begin.max())), slice(int(end.min()), None)
    moved[:, left] = np.where(places[left] < begin, fill[left], moved[:, left])
    moved[:, right] = np.where(places[right] >= end, fill[right], moved[:, right])
    return Image.fromarray(moved.reshape(height, width, 3))


def _cubic_weights(fraction: np.ndarray) -> np.ndarray:
    """PIL's weights (4, rows) of the pixels at -1, 0, 1 and 2 for points at a fraction in [0, 1)."""
    d = fraction
    return np.stack([-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2])
