"""The command `train`: a recipe's mistakes are reported before the slow imports."""

from __future__ import annotations

from collections.abc import Sequence

from pss_composer.training.reading import load_recipe


def train_recipe(path: str, overrides: Sequence[str]) -> None:
    """Read a recipe and train it.

    Args:
        path: A YAML file, or the name of a packaged recipe.
        overrides: Settings like `optimizer.lr=1e-3`.

    Raises:
        InputError: A mistake in the recipe, in the data, or in the weights.
    """
    recipe = load_recipe(path, overrides)
    from pss_composer.training.trainer import run

    run(recipe)
