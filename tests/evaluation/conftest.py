"""Finished runs, as small as can be."""

import pytest
from support.recipes import smoke, split

from pss_composer.training.reading import load_recipe
from pss_composer.training.trainer import train


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """The folder of four runs of two epochs; `wide` is `digits_pss` with twice the embedding."""
    folder = tmp_path_factory.mktemp("runs")
    for run, recipe, overrides in (
        ("digits", "digits", []),
        ("digits_pss", "digits_pss", []),
        ("wide", "digits_pss", ["model.embed_dim=32"]),
        ("pretrain", "digits_pretrain", []),
    ):
        arguments = smoke(recipe, folder / run, "max_duration=2ep", "model.num_classes=10", *overrides)
        train(load_recipe(*split(arguments)))
    return folder
