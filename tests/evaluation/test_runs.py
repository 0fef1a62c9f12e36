"""Runs and their logs, read from their folders."""

import json
import shutil

import pytest
import torch

from pss_composer.errors import InputError
from pss_composer.evaluation.runs import load_run, load_runs, read_metrics, select_training, training_seconds


def test_load_run_has_the_trained_weights(runs):
    saved = torch.load(runs / "digits" / "latest-rank0.pt", weights_only=False)["state"]["model"]
    for name, value in load_run(runs / "digits").model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_runs_of_one_name_are_called_by_their_folders(runs):
    assert [run.name for run in load_runs([runs / "digits", runs / "wide"])] == ["digits", "digits_pss"]
    assert [run.name for run in load_runs([runs / "digits_pss", runs / "wide"])] == ["digits_pss", "wide"]
    folders = [runs / "digits_pss", runs.parent / runs.name / "wide", runs / "digits"]
    assert [run.name for run in load_runs(folders)] == ["digits_pss", "wide", "digits"]


def test_folders_of_one_name_are_called_by_their_places(runs, tmp_path):
    for place in ("first", "second"):
        shutil.copytree(runs / "digits", tmp_path / place / "digits", symlinks=True)
    folders = [tmp_path / place / "digits" for place in ("first", "second")]
    assert [run.name for run in load_runs(folders)] == ["first/digits", "second/digits"]


@pytest.mark.parametrize(
    "recipe",
    ["model: {name: deit, size: tiny, heads: 3}", "model: {name: 3", "- a list", "", "model: {name: deit, depth: two}",
     "seed: \x00"],
    ids=["another_version", "broken", "list", "empty", "type", "no_text"],
)
def test_a_recipe_of_another_version_or_a_broken_one(recipe, runs, tmp_path):
    shutil.copytree(runs / "digits", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    with pytest.raises(InputError, match=r"^run must hold a recipe of this version, .*/recipe\.yaml is not one: .+$"):
        load_run(tmp_path / "run")


def write_log(folder, lines, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


LINES = [{"batch": batch, "loss/train/total": loss, "time/train": loss}
         for batch, loss in ((1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.0))]


def test_the_later_line_of_a_batch_counts(tmp_path):
    lines = [*LINES, {"batch": 3, "metrics/eval/top1": 0.5}]
    write_log(tmp_path, lines)
    metrics = read_metrics(tmp_path)
    assert [line["loss/train/total"] for line in select_training(metrics)] == [3.0, 2.5, 1.0]
    assert [line for line in metrics if "metrics/eval/top1" in line] == lines[-1:]
    assert training_seconds(metrics) == 3.0


def test_lines_that_a_killed_run_cut_short_are_left_out(tmp_path):
    write_log(tmp_path, LINES, end='{"batch": 4, "loss/train/tot')
    assert [line["loss/train/total"] for line in read_metrics(tmp_path)] == [3.0, 2.5, 1.0]
    # the run that goes on appends to what is there
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"settings": {}}\n{"batch": 4, "loss/train/total": 0.5}\n')
    assert [line["loss/train/total"] for line in read_metrics(tmp_path)] == [3.0, 2.5, 1.0, 0.5]


@pytest.mark.parametrize("lines", [[], [{"settings": {}}], [{"batch": 0, "metrics/eval/top1": 0.1}]])
def test_a_log_without_training(lines, tmp_path):
    write_log(tmp_path, lines)
    with pytest.raises(InputError, match=r"^run must have trained a batch, .*metrics\.jsonl has none$"):
        read_metrics(tmp_path)
