"""Transforms of both forms: what the settings do, that the seed alone decides, and that `fast` gives timm's pixels."""

import itertools
import random

import numpy as np
import pytest
import torch
from composer.utils import reproducibility
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from support.paths import YAMLS
from support.pictures import OFF, TAIL, UNNORMALIZED, Preparation, encode

from pss_composer.data.augmentation.device import DeviceTransform
from pss_composer.data.augmentation.settings import FORMS, Augmentation
from pss_composer.data.augmentation.transforms import build_transform
from pss_composer.errors import InputError

both_forms = pytest.mark.parametrize("form", FORMS)

@both_forms
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_transform_takes_images_of_any_mode(mode, form):
    image = Image.new(mode, (30, 20))
    for is_training in (True, False):
        images = Preparation(Augmentation(form=form), 32, is_training=is_training)([image, image], [1, 2])
        assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and images.is_contiguous()


def test_forms_give_what_they_say(photographs):
    pictures = photographs[0], encode(photographs[0])
    for is_training, picture in itertools.product((True, False), pictures):
        fast, timm = (build_transform(Augmentation(form=form), 24, is_training=is_training)(picture, 0)
                      for form in ("fast", "timm"))
        assert fast.shape == (24, 24, 3) and fast.dtype == torch.uint8 and fast.is_contiguous()
        assert timm.shape == (3, 24, 24) and timm.dtype == torch.float32 and timm.is_contiguous()


def test_device_leaves_alone_what_is_normalized():
    images = torch.randn(4, 3, 24, 24)
    transform = DeviceTransform(Augmentation(random_erasing=1.0), is_training=True)
    assert transform(images) is images and transform(images.clone()).equal(images)


@both_forms
def test_evaluation_resizes_and_crops(form):
    # 256/224 of 28 is 32: an image of 32 by 64 keeps its size, and its middle 28 by 28 are left
    pixels = np.arange(32, dtype=np.uint8)[:, None] + 3 * np.arange(64, dtype=np.uint8)
    prepare = Preparation(Augmentation(form=form, mean=[0.0] * 3, std=[1 / 255] * 3), 28, is_training=False)
    image = prepare([Image.fromarray(pixels)], [0])[0]
    assert (image[0].round().int().numpy() == pixels[2:30, 18:46]).all()


@both_forms
def test_plain_training_is_evaluation(form, photographs):
    plain = Preparation(Augmentation(form=form, is_plain=True, random_erasing=1.0), 16)
    evaluation = Preparation(Augmentation(form=form), 16, is_training=False)
    assert torch.equal(plain(photographs, range(6)), evaluation(photographs, range(6, 12)))


@both_forms
@pytest.mark.parametrize("switched_on", [
    {"rand_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}, {"hflip": 0.5}, {"random_erasing": 0.25},
    {"scale": [0.5, 1.0]},
], ids=lambda on: next(iter(on)))
def test_every_augmentation_does_something(switched_on, form, thumbnails):
    def num_looks(settings):
        prepare = Preparation(Augmentation(form=form, **settings), 16)
        return len({tuple(image.flatten().tolist()) for image in prepare([thumbnails[0]] * 30, range(30))})

    assert num_looks(OFF) == 1
    assert num_looks(OFF | switched_on) > 1


@both_forms
@pytest.mark.parametrize(("ratio", "num_columns"), [(4.0, 12), (0.25, 3)])
def test_ratio_is_width_over_height(ratio, num_columns, form):
    # a quarter of 12 by 12 pixels is 12 by 3 or 3 by 12
    pixels = np.broadcast_to(20 * np.arange(12, dtype=np.uint8), (12, 12))
    settings = OFF | {"scale": [0.25, 0.25], "ratio": [ratio, ratio], "interpolation": "nearest"}
    image = Preparation(Augmentation(form=form, **settings), 12)([Image.fromarray(pixels)], [0])[0]
    assert len(image[0].unique()) == num_columns


@both_forms
def test_color_jitter_comes_with_three_operations_but_no_others(form, thumbnails):
    def num_looks(rand_augment):
        prepare = Preparation(Augmentation(form=form, **OFF | {"rand_augment": rand_augment, "color_jitter": 0.4}), 16)
        return len({tuple(image.flatten().tolist()) for image in prepare([thumbnails[0]] * 30, range(30))})

    assert num_looks("rand-p0") == 1
    assert num_looks("rand-p0-t3a") == num_looks("rand-p0-t3aw") == 30


@both_forms
def test_random_interpolation_draws_bicubic_or_bilinear(form, photographs):
    def prepare(interpolation, seeds):
        augmentation = Augmentation(form=form, **OFF | {"interpolation": interpolation})
        return Preparation(augmentation, 16)([photographs[0].resize((48, 48))] * len(seeds), seeds)

    (bicubic,), (bilinear,), images = prepare("bicubic", [0]), prepare("bilinear", [0]), prepare("random", range(400))
    is_bicubic, is_bilinear = ((images == image).flatten(1).all(1) for image in (bicubic, bilinear))
    assert (is_bicubic ^ is_bilinear).all()
    assert stats.binomtest(int(is_bicubic.sum()), 400, 0.5).pvalue > TAIL


def test_augmentation_is_a_structured_config():
    config = OmegaConf.merge(OmegaConf.structured(Augmentation), {"rand_augment": None, "scale": [0.67, 1]})
    assert OmegaConf.to_object(config) == Augmentation(rand_augment=None, scale=[0.67, 1.0])


@pytest.mark.parametrize(("key", "value"), [
    ("interpolation", "cubic"), ("color_jitter", -0.1), ("hflip", 1.1), ("random_erasing", -0.1),
    ("scale", [0.5, 1.5]), ("scale", [0.5]), ("ratio", [2.0, 1.0]), ("crop_pct", 0.0), ("mean", [0.5]),
    ("std", [1.0, 1.0, 0.0]), ("rand_augment", "m9"), ("rand_augment", "rand-q9"), ("rand_augment", "rand-mx"),
    ("rand_augment", "rand-tnone"), ("rand_augment", ""), ("form", "faster"), ("repeats", 0),
])
def test_bad_augmentation(key, value):
    with pytest.raises(InputError, match=rf"^{key} must be .*, got ") as error:
        build_transform(Augmentation(**{key: value}), 16, is_training=False)
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


# seeds


@both_forms
@pytest.mark.parametrize("settings", [{}, {"rand_augment": None}, {"rand_augment": "rand-n3-tweights"}],
                         ids=["rand_augment", "color_jitter", "tweights"])
def test_seed_decides_and_generators_are_left_alone(settings, form, photographs):
    transform = build_transform(
        Augmentation(form=form, interpolation="random", **settings), 24, is_training=True)
    reproducibility.seed_all(1)
    random.gauss(0, 1)  # Python keeps the second number of a pair for the next call
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    images = [transform(photographs[0], seed) for seed in (5, 2**63 - 1, 5)]
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    # nor do they matter
    reproducibility.seed_all(2)
    assert torch.equal(transform(photographs[0], 5), images[0])


@both_forms
@pytest.mark.parametrize("is_training", [True, False])
def test_pictures_before_do_not_matter(is_training, form, photographs):
    # a decoded picture may be kept for its next view: it must be that one, and must not have been written to
    def transform():
        return build_transform(Augmentation(form=form, **UNNORMALIZED), 24, is_training=is_training)

    views = [(encode(image), seed) for image in photographs[:3] for seed in range(3)]
    expected = {view: transform()(*view) for view in views}
    used = transform()
    for view in views + views[::-1] + random.Random(0).choices(views, k=20):
        image = used(bytes(bytearray(view[0])), view[1])
        assert torch.equal(image, expected[view])
        image.zero_()


# one picture, nothing random


# mean absolute differences, in grey levels of 255, that one picture may have; measured: at most 0.010 and 0.19
BARS = {"bicubic": 0.05, "bilinear": 0.5}


def mean_difference(settings, image_size, pictures, *, is_training):
    """Mean absolute difference of the forms, in grey levels, on the worst of some pictures."""
    images = [Preparation(Augmentation(form=form, **UNNORMALIZED, **settings), image_size, is_training=is_training)(
        pictures, range(len(pictures))) for form in FORMS]
    return 255 * float((images[0] - images[1]).abs().flatten(1).mean(1).max())


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (150, 100), (60, 300)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [224 / 256, 1.0])
@pytest.mark.parametrize("image_size", [224, 384])
def test_evaluation_is_that_of_timm(image_size, crop_pct, interpolation, size, photographs):
    pictures = [encode(image.resize(size), quality=90) for image in photographs[::2]]
    settings = {"crop_pct": crop_pct, "interpolation": interpolation}
    assert mean_difference(settings, image_size, pictures, is_training=False) < BARS[interpolation]


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (150, 100)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [224, 384])
def test_training_with_nothing_random_is_that_of_timm(image_size, interpolation, size, photographs):
    pictures = [encode(image.resize(size), quality=90) for image in photographs[::2]]
    settings = OFF | {"ratio": [size[0] / size[1]] * 2, "interpolation": interpolation}
    assert mean_difference(settings, image_size, pictures, is_training=True) < BARS[interpolation]


@pytest.mark.parametrize("recipe", sorted([*YAMLS.glob("deit_*.yaml"), *YAMLS.glob("simmim_*.yaml")]),
                         ids=lambda path: path.stem)
def test_paper_recipes_name_the_form_that_they_train_with(recipe):
    assert OmegaConf.load(recipe).augmentation.form in FORMS
