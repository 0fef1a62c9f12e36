"""Seeding for a block leaves the global generators alone."""

import random

import numpy as np
import pytest
import torch
from composer.utils import reproducibility

from pss_composer.data.augmentation.randomness import seeded, seeded_python


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seeded_decides_all_three_generators_and_leaves_them_alone():
    reproducibility.seed_all(1)
    expected = [draw(), draw()]
    with seeded(7):
        inside = draw()
    reproducibility.seed_all(1)
    actual = [draw()]
    with pytest.raises(KeyError), seeded(7):
        assert draw() == inside
        raise KeyError
    assert [*actual, draw()] == expected


def test_seeded_python_decides_python_alone():
    random.seed(1)
    expected = [random.random(), random.random()]
    with seeded_python(7):
        inside = random.random()
    random.seed(1)
    actual = [random.random()]
    with pytest.raises(KeyError), seeded_python(7):
        assert random.random() == inside == random.Random(7).random()
        raise KeyError
    assert [*actual, random.random()] == expected
