"""The commands `evaluate`, `report` and `reconstruct`; each finds bad input before it evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pss_composer.errors import InputError
from pss_composer.evaluation.measuring import format_table
from pss_composer.evaluation.pictures import plot_kept_patches, plot_reconstruction, plot_schedule, prepare_picture
from pss_composer.evaluation.runs import Run, load_run, load_runs
from pss_composer.schedules import check_keep_rate


def evaluate_runs(folders: Sequence[str], keep_rates: Sequence[float]) -> None:
    """Print what trained classifiers do at each keep rate.

    Args:
        folders: Each the `save_folder` of a run.
        keep_rates: Each in (0, 1].

    Raises:
        InputError: A bad keep rate, or a folder without a trained classifier.
    """
    print(format_table(_load_classifiers(folders, keep_rates), keep_rates))


def report_runs(folders: Sequence[str], keep_rates: Sequence[float], out: Path) -> None:
    """`evaluate_runs`, and the pictures `schedule.png` of all runs and `patches.png` of the last one.

    Args:
        folders: Each the `save_folder` of a run, at least one of them under PSS.
        keep_rates: Each in (0, 1].
        out: The folder of the pictures.

    Raises:
        InputError: What `evaluate_runs` raises; no run under PSS; pictures cannot be written.
    """
    runs = _load_classifiers(folders, keep_rates)
    if not any(run.recipe.pss for run in runs):
        raise InputError("must be under PSS, one at least, for the picture of its schedule", key="run")
    schedule, patches = out / "schedule.png", out / "patches.png"
    for path in (schedule, patches):
        prepare_picture(path)
    print(format_table(runs, keep_rates))
    plot_schedule(runs, schedule)
    plot_kept_patches(runs[-1], patches)
    print(f"\npictures: {schedule}, {patches}")


def reconstruct_images(folder: str, out: Path) -> None:
    """Draw what a pre-trained model paints into masked patches.

    Args:
        folder: The `save_folder` of a run of pre-training.
        out: The picture, a `.png`.

    Raises:
        InputError: No such run, or the picture cannot be written.
    """
    if out.suffix != ".png":
        raise InputError(f"must be a file with the suffix .png, got {str(out)!r}", key="out")
    run = load_run(folder)
    if run.recipe.masking is None:
        raise InputError(f"must be of pre-training (model.name=simmim_pretrain), {run.folder} is of a classifier",
                         key="run")
    prepare_picture(out)
    plot_reconstruction(run, out)
    print(f"picture: {out}")


def _load_classifiers(folders: Sequence[str], keep_rates: Sequence[float]) -> list[Run]:
    for keep_rate in keep_rates:
        check_keep_rate(keep_rate, "keep_rates")
    runs = load_runs(folders)
    for run in runs:
        if run.recipe.masking is not None:
            raise InputError(f"must be of a classifier, {run.folder} is of pre-training: see reconstruct", key="run")
    return runs
