"""Images, and the shards that every conversion of them must give."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from support.conversion import CLASSES, convert, encode, random_image

NUM_IMAGES = {"train": 8, "val": 3}  # per class


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Small images of noise and two photographs."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image).resize((64, 48)) for image in load_sample_images().images]
    for split, num_images in NUM_IMAGES.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(num_images):
                image = photographs[index] if index < len(photographs) else random_image(rng)
                (root / split / name / f"{name}_{index}.JPEG").write_bytes(encode(image, quality=80 + index))
    return root


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory):
    """What all conversions of `source` must give; most tests compare with it."""
    out = tmp_path_factory.mktemp("converted")
    convert(source, out, num_workers=1)
    return out


@pytest.fixture
def copied(source, tmp_path):
    """Images that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "copied"))
