"""The faster operations of RandAugment give the pixels of PIL."""

import itertools

import numpy as np
import pytest
from PIL import Image
from support.pictures import Preparation
from timm.data import auto_augment

from pss_composer.data.augmentation.operations import FASTER
from pss_composer.data.augmentation.randomness import seeded
from pss_composer.data.augmentation.settings import Augmentation

SHIFTS = [0.0, 0.05, 0.1, 0.2, 0.25, 0.27, 0.3, 0.45, 0.9, 1.0, 1.5, 3.0, 1 / 3, 1 / 224, 0.5 / 224,
          *np.random.default_rng(0).uniform(0, 0.5, 10)]
BLENDS = [0.0, 0.1, 0.19, 0.5, 0.82, 1.0, 1.3, 1.81, 1.9, 3.0, -0.5]
SIZES = [(224, 224), (167, 125), (33, 47), (8, 8), (13, 1), (1, 13), (1, 1)]
BLENDING = [auto_augment.brightness, auto_augment.contrast]


def apply_both(operation, image, factor, seed, **options):
    """The pixels of timm's operation and of the faster one."""
    images = []
    for function in (operation, FASTER[operation]):
        with seeded(seed):  # both draw the same one of several interpolations
            images.append(np.asarray(function(image, factor, **options)).astype(int))
    return images


@pytest.mark.parametrize("operation", BLENDING, ids=lambda operation: operation.__name__)
def test_blending_gives_the_pixels_of_pil(operation, photographs):
    for size, picture, factor in itertools.product(SIZES, (1, 3, 5), BLENDS):
        timm, fast = apply_both(operation, photographs[picture].resize(size), factor, 0)
        assert (timm == fast).all(), (size, factor)


# the interpolation that is drawn is one of the others: a few sizes show that both draw the same
@pytest.mark.parametrize(("resample", "sizes"), [
    ("NEAREST", SIZES[1:]), ("BILINEAR", SIZES[1:]), ("BICUBIC", SIZES), ("random", SIZES[2:])])
@pytest.mark.parametrize("operation", [operation for operation in FASTER if operation not in BLENDING],
                         ids=lambda operation: operation.__name__)
def test_moving_gives_the_pixels_of_pil(operation, resample, sizes, photographs):
    options = {"fillcolor": (124, 116, 104)}
    options["resample"] = (Image.BILINEAR, Image.BICUBIC) if resample == "random" else Image.Resampling[resample]
    for number, (size, picture) in enumerate(itertools.product(sizes, (1, 3, 5))):
        image = photographs[picture].resize(size)
        for factor in SHIFTS + [-shift for shift in SHIFTS]:
            timm, fast = apply_both(operation, image, factor, number, **options)
            difference = np.abs(timm - fast)
            if resample in ("NEAREST", "BILINEAR"):
                assert not difference.any(), (size, factor)
            else:
                # PIL adds in another order, and cuts off what is behind the point
                assert difference.max() <= 1, (size, factor)
                assert min(size) < 8 or (difference > 0).mean() < 0.05, (size, factor)


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x_rel", "translate_y_rel"])
def test_flat_areas_stay_flat(name):
    operation = FASTER[getattr(auto_augment, name)]
    for value, factor in itertools.product((255, 200, 128, 77, 1), SHIFTS):
        image = Image.new("RGB", (61, 45), (value,) * 3)
        moved = operation(image, factor, fillcolor=(0, 0, 0), resample=Image.Resampling.BICUBIC)
        assert set(np.unique(np.asarray(moved))) <= {0, value}


def test_operations_are_replaced_that_timm_uses():
    prepare = Preparation(Augmentation(), 224)
    replaced = {op.name for op in prepare.rand_augment.ops if op.aug_fn in FASTER.values()}
    assert replaced == {"ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "BrightnessIncreasing",
                        "ContrastIncreasing"}
