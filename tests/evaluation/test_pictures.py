"""Pictures: what they show, in whose words, and that nothing of it is cut off."""

import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from support.recipes import smoke, split

from pss_composer import apply_patch_sampling
from pss_composer.evaluation.pictures import (
    find_class_names,
    mean_losses,
    plot_kept_patches,
    plot_reconstruction,
    plot_schedule,
)
from pss_composer.evaluation.runs import Run
from pss_composer.training.builders import build_data, build_model
from pss_composer.training.reading import load_recipe

LONG = "a_run_with_a_name_that_is_much_longer_than_the_picture_is_wide_and_that_has_not_a_single_space_to_break_it_at"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, laid out as in the file."""
    figures = []
    save = Figure.savefig

    def savefig(figure, path, **options):
        save(figure, path, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def build_run(folder, name, *overrides, title="run"):
    recipe = load_recipe(*split(smoke(name, folder, *overrides)))
    model = build_model(recipe.model)
    return Run(title, folder, recipe, model, apply_patch_sampling(model, sampler="random" if "pre" in name else
                                                                  "magnitude"))


def write_log(folder, losses):
    """Batches of a run, from epoch, keep rate (None: not under PSS) and loss; four batches an epoch."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"epoch": epoch, "batch": number + 1, "time/batch_in_epoch": number % 4, "loss/train/total": loss}
        | ({} if keep_rate is None else {"pss/keep_rate": keep_rate})
        for number, (epoch, keep_rate, loss) in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def check_texts(figure):
    """No text leaves the figure, and no caption meets its neighbour."""
    texts = [*figure.texts]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    texts = [text for text in texts if text.get_text()]
    assert texts
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()
    for left, right in pairwise(figure.axes):
        if left.get_subplotspec().rowspan == right.get_subplotspec().rowspan:
            assert left.xaxis.label.get_window_extent().x1 < right.xaxis.label.get_window_extent().x0


def captions(figure):
    """Row by row, the text below every image and whether it is red."""
    num_columns = figure.axes[0].get_subplotspec().get_gridspec().ncols
    found = [(axes.get_xlabel(), axes.xaxis.label.get_color() == "#c92a2a") for axes in figure.axes]
    return [found[start:start + num_columns] for start in range(0, len(found), num_columns)]


def write_images(folder, classes):
    """Two images per class, in class folders; the classes differ in brightness."""
    for split_name in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split_name / name).mkdir(parents=True)
            for number in range(2):
                image = Image.fromarray(np.full((32, 32, 3), 20 * label, dtype=np.uint8))
                image.save(folder / split_name / name / f"{number}.png")


def answer_always(run, label):
    torch.nn.init.zeros_(run.model.vit.head.weight)
    with torch.no_grad():
        run.model.vit.head.bias.copy_(torch.eye(len(run.model.vit.head.bias))[label])


def test_captions_name_the_answered_and_the_true_class(tmp_path, drawn):
    # a batch of evaluation holds a single image: the classes are in several of them
    write_images(tmp_path, ["ankle_boot", "bag", "chicken_quesadilla_with_everything"])
    run = build_run(tmp_path, "digits_pss", "data.name=folder", f"data.path={tmp_path}", "model.num_classes=3",
                    "eval_batch_size=1", title=LONG)
    answer_always(run, 0)
    plot_kept_patches(run, tmp_path / "patches.png", keep_rates=(1.0, 0.5))
    (figure,) = drawn
    row = [("ankle boot", False), ("ankle boot\nis bag", True), ("ankle boot\nis chicken\nquesadilla…", True)]
    assert captions(figure) == [row, row]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["ρ = 1.0", "ρ = 0.5"]
    check_texts(figure)
    assert run.patch_sampler.eval_keep_rate == 1.0


def test_ten_classes_that_nobody_names(tmp_path, drawn):
    run = build_run(tmp_path, "digits_pss", "model.num_classes=10", "data.num_samples=200", title=LONG)
    answer_always(run, 9)
    plot_kept_patches(run, tmp_path / "patches.png", keep_rates=(1.0, 0.8, 0.6, 0.4, 0.2))
    assert captions(drawn[0]) == 5 * [[*((f"9\nis {label}", True) for label in range(9)), ("9", False)]]
    check_texts(drawn[0])


def test_tiles_show_what_is_kept(tmp_path, drawn):
    write_images(tmp_path, ["a", "b"])
    run = build_run(tmp_path, "digits_pss", "data.name=folder", f"data.path={tmp_path}", "model.num_classes=2")
    plot_kept_patches(run, tmp_path / "patches.png", keep_rates=(1.0, 0.5))
    whole, half = (axes.images[0].get_array() for axes in drawn[0].axes[::2])
    assert np.allclose(whole, 0, atol=1e-6)
    patches = half.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    is_kept = np.isclose(patches, 0, atol=1e-6).all(axis=1)
    # half of 65 tokens is 32, less the class token
    assert is_kept.sum() == 31
    assert np.allclose(patches[~is_kept], np.tile([0.576, 0.656, 0.76], 16))


@pytest.mark.parametrize("classes", ["[]", "3", '["zero", 1, "two"]', "no JSON", None])
def test_names_of_classes_beside_shards(classes, tmp_path):
    run = build_run(tmp_path, "digits_pss", f"data.path={tmp_path}")
    if classes is not None:
        (tmp_path / "val").mkdir()
        (tmp_path / "val" / "classes.json").write_text(classes)
    expected = {'["zero", 1, "two"]': ["zero", "1", "two"]}.get(classes, [])
    assert find_class_names(run, build_data(run.recipe, "val")) == expected


def test_names_of_classes_of_the_data_come_first(tmp_path):
    data = SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(classes=["T-shirt", "Trouser"])))
    assert find_class_names(build_run(tmp_path, "digits_pss"), data) == ["T-shirt", "Trouser"]


def test_reconstruction(tmp_path, drawn):
    run = build_run(tmp_path, "digits_pretrain", "data.num_samples=8", title=LONG)
    plot_reconstruction(run, tmp_path / "reconstruction.png", num_images=3)
    check_texts(drawn[0])
    image, masked, painted = (axes.images[0].get_array() for axes in drawn[0].axes[::3])
    is_masked = np.isclose(masked, [0.72, 0.82, 0.95]).all(axis=2)
    assert 0.4 < is_masked.mean() < 0.8
    assert np.array_equal(image[~is_masked], painted[~is_masked])
    assert not np.allclose(image[is_masked], painted[is_masked])


def test_losses_of_one_keep_rate_are_compared_with_each_other(tmp_path, drawn):
    under_pss = [(0, 0.2, 5.0), (0, 0.2, 4.0), (0, 1.0, 3.0), (0, 0.2, 3.0), (1, 0.2, 4.5), (1, 1.0, 2.5)]
    write_log(tmp_path / "pss", under_pss)
    write_log(tmp_path / "dense", [(0, None, 3.0), (0, None, 2.0), (1, None, 1.0)])
    runs = [build_run(tmp_path / "dense", "digits", title="dense"),
            build_run(tmp_path / "pss", "digits_pss", title=LONG)]
    plot_schedule(runs, tmp_path / "schedule.png", num_epochs=1)
    (figure,) = drawn
    check_texts(figure)
    losses, keep_rates, losses_at = ([(line.get_label().replace("\n", ""), [list(values) for values in line.get_data()])
                                      for line in axes.lines] for axes in figure.axes)
    assert losses == [("dense, ρ = 1.0", [[1, 2], [2.5, 1.0]]), (f"{LONG}, ρ = 1.0", [[1, 2], [3.0, 2.5]])]
    assert losses_at == [("ρ = 0.2", [[1, 2], [4.0, 4.5]]), ("ρ = 1.0", [[1, 2], [3.0, 2.5]])]
    assert keep_rates[0][1] == [[0.5, 0.75, 1.0, 1.25], [1.0, 0.2, 0.2, 1.0]]


def test_keep_rates_that_are_many_are_rounded():
    numbers = [21, 22, 23, 24, 36, 37, 38, 39, 97, 98, 99]
    lines = [{"epoch": 0, "pss/keep_rate": number / 100, "loss/train/total": float(number)} for number in numbers]
    assert mean_losses(lines) == {0.2: {1: 22.5}, 0.4: {1: 37.5}, 1.0: {1: 98.0}}
    assert list(mean_losses(lines[:10])) == [number / 100 for number in numbers[:10]]
