"""Evaluation at each keep rate, FLOP shares against the paper's, and the report of finished runs."""

import json

import pytest
import torch
from PIL import Image
from support.recipes import smoke

from pss_composer import apply_patch_sampling
from pss_composer.__main__ import main as command_line
from pss_composer.evaluation.runs import count_flops, evaluate_run, flop_shares, load_run
from pss_composer.models import DeiT, SimMIMClassifier
from pss_composer.evaluation.pictures import read_metrics, training_seconds
from pss_composer.training.trainer import build_data, main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("digits", "digits_pss"):
        main(smoke(name, folder / name, "max_duration=2ep", "model.num_classes=10"))
    return folder


@pytest.mark.parametrize(
    ("model", "image_size", "shares"),
    [
        (lambda: DeiT("small"), 224, {0.8: 0.792, 0.6: 0.585, 0.4: 0.390, 0.2: 0.196}),
        (lambda: DeiT("small", image_size=384), 384, {0.8: 0.771, 0.6: 0.556, 0.4: 0.359, 0.2: 0.176}),
        (lambda: SimMIMClassifier("base"), 224, {0.8: 0.797, 0.6: 0.592, 0.4: 0.395, 0.2: 0.197}),
    ],
    ids=["deit_small_224", "deit_small_384", "simmim_vitb"],
)
def test_flop_shares_are_the_papers(model, image_size, shares):
    vit = model().module.eval()
    sampler = apply_patch_sampling(vit)
    images = torch.zeros(1, 3, image_size, image_size)
    at_one = count_flops(vit, images)
    for keep_rate, share in shares.items():
        sampler.eval_keep_rate = keep_rate
        assert count_flops(vit, images) / at_one == pytest.approx(share, abs=0.003)


def test_evaluate_run_is_right_at_every_keep_rate(runs):
    run = load_run(runs / "digits_pss")
    run.patch_sampler.eval_keep_rate = 0.7
    metrics = evaluate_run(run, [1.0, 0.4])
    assert run.patch_sampler.eval_keep_rate == 0.7
    for keep_rate in (1.0, 0.4):
        run.patch_sampler.eval_keep_rate = keep_rate
        num_right = num_images = 0
        with torch.no_grad():
            data = build_data(run.recipe, "val")
            for images, labels in map(data.batch_transforms, data.dataloader):
                num_right += int((run.model.module.eval()(images).argmax(dim=1) == labels).sum())
                num_images += len(labels)
        assert metrics[keep_rate]["top1"] == pytest.approx(num_right / num_images)


def test_load_run_has_the_trained_weights(runs):
    saved = torch.load(runs / "digits" / "latest-rank0.pt", weights_only=False)["state"]["model"]
    for name, value in load_run(runs / "digits").model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_flop_shares_leave_the_dial_at_one(runs):
    run = load_run(runs / "digits_pss")
    shares = flop_shares(run, [1.0, 0.5])
    assert shares[1.0] == 1.0 and 0.4 < shares[0.5] < 0.6
    assert run.patch_sampler.eval_keep_rate == 1.0


def test_report_prints_a_table_and_draws_two_pictures(runs, tmp_path, capsys):
    command_line(["report", str(runs / "digits"), str(runs / "digits_pss"), "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    rows = [line.split() for line in table.splitlines()]
    assert [row[0] for row in rows if row and row[0][0] in "01"] == ["1.0", "0.8", "0.6", "0.4", "0.2"]
    assert rows[0][-2:] == ["digits", "digits_pss"]
    # in two batches an epoch, half of them at 0.2 and half at 1: the share is between
    (training,) = [row for row in rows if row[:2] == ["training,", "FLOP"]]
    (seconds,) = [row for row in rows if row[:2] == ["training,", "s"]]
    assert all(0 < float(cell) < 100 for cell in seconds[2:])
    assert float(training[-2]) == 1.0 and 0.55 < float(training[-1]) < 0.65
    for name in ("schedule.png", "patches.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20


def test_the_later_line_of_a_batch_counts(tmp_path):
    lines = [{"batch": batch, "loss/train/total": loss, "time/train": loss}
             for batch, loss in ((1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.0))]
    lines.append({"batch": 3, "metrics/eval/top1": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = read_metrics(tmp_path)
    assert [line["loss/train/total"] for line in metrics if "loss/train/total" in line] == [3.0, 2.5, 1.0]
    assert [line for line in metrics if "metrics/eval/top1" in line] == lines[-1:]
    assert training_seconds(metrics) == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{tmp}/none"], "run must be the save_folder of a trained recipe, no recipe.yaml in {tmp}/none"),
        (["evaluate", "{runs}/digits", "--keep-rates", "1.5"], "--keep-rates must be in (0, 1], got 1.5"),
        (["report", "{runs}/digits", "--out", "{tmp}/out"], "runs must have one under PSS"),
    ],
)
def test_bad_input(arguments, message, runs, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        command_line([argument.format(tmp=tmp_path, runs=runs) for argument in arguments])
    assert exit_info.value.code.startswith("error: " + message.format(tmp=tmp_path))
    assert list(tmp_path.iterdir()) == []
