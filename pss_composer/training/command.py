"""The command `train`: a recipe's mistakes are reported before the slow imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pss_composer.errors import InputError
from pss_composer.training.reading import load_recipe


def train_recipe(path: str, overrides: Sequence[str]) -> None:
    """Read a recipe and train it.

    Args:
        path: A YAML file, or the name of a packaged recipe.
        overrides: Settings like `optimizer.lr=1e-3`.

    Raises:
        InputError: A mistake in the recipe, in the data, or in the weights.
    """
    try:
        recipe = load_recipe(path, overrides)
    except InputError:
        if int(os.environ.get("RANK", "0")) > 0:
            sys.exit(1)  # every rank of Composer's launcher sees the same mistakes: the first one reports them
        raise
    from pss_composer.training.trainer import run

    run(recipe)
