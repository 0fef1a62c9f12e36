"""Runs of this project as files for timm; the number of heads; bad arguments; the commands."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_checks import (
    PRETRAINING_ONLY,
    assert_close,
    assert_same,
    load_into_timm,
    logits_of,
    read_account,
    read_timm_arguments,
    refuse,
    together,
)
from support.checkpoint_files import (
    reference_images,
    reference_logits,
    save,
    shape,
    simmim_file,
    timm_vit_weights,
)
from support.checkpoint_runs import train
from support.hostile import CALLS
from support.paths import ROOT
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.layouts import read_weights
from pss_composer.checkpoints.reading import LATEST
from pss_composer.checkpoints.transfer import load_pretrained
from pss_composer.cli import main
from pss_composer.models.deit import DeiT


def read_state(path):
    """The state that Composer saved, and the EMA's."""
    contents = torch.load(path, weights_only=False)
    return contents, next(state for name, state in contents["state"]["algorithms"] if name == "EMA")


def remove_prefix(weights):
    return {name.removeprefix("module."): weight for name, weight in weights.items()}


def average_by_hand(run):
    """The moving average of three batches: it starts after the first, and falls by half in three."""
    averages = None
    for batch in (1, 2, 3):
        _, ema = read_state(run / f"ep0-ba{batch}-rank0.pt")
        assert ema["ema_weights_active"]  # then Composer keeps what is trained in the place of the averages
        weights, keep = ema["ema_model"]["named_parameters_dict"], 2 ** (-1 / 3)
        averages = weights if averages is None else {
            name: keep * averages[name] + (1 - keep) * weight for name, weight in weights.items()}
    return remove_prefix(averages)


@pytest.mark.parametrize("source", ["", "latest-rank0.pt", "ep0-ba3-rank0.pt"])
def test_export_of_a_run_under_ema(run, out, source):
    contents, ema = read_state(run / "ep0-ba3-rank0.pt")
    assert "a Composer checkpoint, its moving averages" in export_weights(run / source, out, ema=True)
    weights = load_file(out)
    assert_same(weights, remove_prefix(contents["state"]["model"]))
    for name, expected in average_by_hand(run).items():
        assert_close(weights[name], expected)
    load_into_timm(out)
    out.unlink()
    assert "averages" not in export_weights(run / source, out)
    assert_same(load_file(out), remove_prefix(ema["ema_model"]["named_parameters_dict"]))
    assert_same(read_weights(run).tensors, weights)  # of the last checkpoint
    # a model starts from what Composer saved, and evaluates
    assert_same(read_weights(run / LATEST).tensors, weights)


def test_export_of_a_checkpoint_that_composer_saved_without_the_swap(run, tmp_path, out):
    contents, ema = read_state(run / "latest-rank0.pt")
    ema["ema_weights_active"] = False
    path = save(contents, tmp_path / "file.pt")
    export_weights(path, out, ema=True)
    assert_same(load_file(out), remove_prefix(ema["ema_model"]["named_parameters_dict"]))
    out.unlink()
    ema["ema_started"] = False
    message = refuse(export_weights, save(contents, path), out, ema=True, key="ema")
    assert message == f"ema needs a checkpoint with moving averages, {path} has none"


@pytest.mark.parametrize("kind", ["classifier", "pretraining"])
def test_export_is_the_model_of_the_run(tmp_path, out, kind):
    trainer = train(tmp_path / "run", is_pretraining=kind == "pretraining", ema=False, stop_at=5)
    vit = trainer.state.model.vit.eval()
    account = read_account(export_weights(tmp_path / "run", out))
    exported, images = load_into_timm(out), reference_images("simmim")
    assert account["loaded"] == together(exported.state_dict())
    assert account["dropped"] == Counter(PRETRAINING_ONLY - {"encoder.rel_pos_bias.relative_position_index"}
                                         if kind == "pretraining" else ())
    if kind == "pretraining":
        vit.patch_embed.norm = nn.Identity()
    assert torch.equal(exported.forward_features(images), vit.forward_features(images))
    assert torch.equal(exported(images), vit(images))
    out.unlink()
    export_weights(tmp_path / "run", out, image_size=48)
    assert load_into_timm(out)(torch.zeros(1, 3, 48, 48)).isfinite().all()
    out.unlink()
    assert "moving averages" in refuse(export_weights, tmp_path / "run", out, ema=True, key="ema")


# the number of heads

def build_deit(**options):
    return DeiT(shape(**{"embed_dim": None, "image_size": 16, "depth": 1, "num_heads": None, **options}))


def save_run(folder, recipe, **options):
    """A checkpoint of a DeiT, with a recipe beside it."""
    if recipe is not None:
        (folder / "recipe.yaml").write_text(recipe)
    return save({"state": {"model": build_deit(**options).state_dict()}}, folder / "ep1-ba1-rank0.pt")


def read_num_heads(path):
    return read_timm_arguments(path)[1]["num_heads"]


@pytest.mark.parametrize(("recipe", "expected"), [
    ("model: {size: tiny, num_heads: null}", 3),  # DeiT-Ti has 3 heads
    ("model: {size: tiny, num_heads: 4}", 4),
    (None, None),
    # these do not say it
    ("{}", None), ("model: null", None), ("model: {size: huge}", None), ("a: [1", None),
    ("model: {size: tiny, num_heads: many}", None), ("model: {size: tiny, num_heads: -4}", None),
])
def test_number_of_heads_of_a_run_is_its_recipes(tmp_path, out, recipe, expected):
    report = export_weights(save_run(tmp_path, recipe, num_heads=4), out)
    assert read_num_heads(out) == expected
    assert f"num_heads, which the weights do not show: {expected} (" in report


def test_number_of_heads_stays_in_an_export_and_must_be_the_models(tmp_path, out):
    path = save_run(tmp_path, "model: {size: tiny, num_heads: 4}", num_heads=4)
    export_weights(path, out)
    again = out.with_name("again.safetensors")
    export_weights(out, again)
    assert read_num_heads(again) == 4
    for source in (path, out):
        load_pretrained(build_deit(num_heads=4), source)
        assert "has 4 heads, the model 3" in refuse(load_pretrained, build_deit(), source)


@pytest.mark.parametrize("metadata", [
    None, {}, {"timm": "{"}, {"timm": "{}"}, {"timm": "[1]"}, {"timm": '{"arguments": {"num_heads": "4"}}'},
    {"timm": '{"arguments": {"num_heads": 0}}'}, {"timm": '{"arguments": {"num_heads": -4}}'},
])
def test_metadata_that_do_not_say_the_number_of_heads(tmp_path, out, metadata):
    path = tmp_path / "vit.safetensors"
    save_file(timm_vit_weights(), path, metadata)
    assert read_weights(path).num_heads is None
    export_weights(path, out)
    assert read_num_heads(out) is None


def test_a_number_of_heads_that_the_width_cannot_have(tmp_path, out):
    path = tmp_path / "vit.safetensors"
    save_file(timm_vit_weights(), path, {"timm": '{"arguments": {"num_heads": 5}}'})
    export_weights(path, out)
    assert read_num_heads(out) is None


@pytest.mark.parametrize(("embed_dim", "expected"), [(192, 3), (384, 6), (200, None)])
def test_number_of_heads_of_a_published_vit_is_that_of_its_width(tmp_path, out, embed_dim, expected):
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=7, embed_dim=embed_dim, depth=1, num_heads=4)
    export_weights(save({"model": vit.state_dict()}, tmp_path / "deit.pth"), out)
    assert read_num_heads(out) == expected


# bad arguments

@pytest.mark.parametrize(("key", "out_name", "options", "message"), [
    ("out", "there.safetensors", {}, "must be a new file with the suffix .safetensors, got .*/there.safetensors"),
    ("out", "vit.bin", {}, "must be a new file with the suffix .safetensors, got .*/vit.bin"),
    ("out", "none/vit.safetensors", {}, "must be a file that can be written, .* cannot: No such file or directory"),
    ("out", 300 * "x" + ".safetensors", {}, "must be a file that can be written, .* cannot: .*name too long"),
    ("image_size", "vit.safetensors", {"image_size": 30}, "must be a multiple of the patch size 4, got 30"),
    ("image_size", "vit.safetensors", {"image_size": 0}, "must be a multiple of the patch size 4, got 0"),
    ("image_size", "vit.safetensors", {"image_size": -4}, "must be a multiple of the patch size 4, got -4"),
    ("ema", "vit.safetensors", {"ema": True}, "needs a checkpoint with moving averages, .* has none"),
])
def test_bad_arguments(published, tmp_path, key, out_name, options, message):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    line = refuse(export_weights, published["simmim"], tmp_path / out_name, **options, key=key)
    assert re.search(f"^{key} {message}", line)
    assert there.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [there]


def test_a_folder_that_is_not_a_runs(tmp_path, out):
    message = refuse(export_weights, tmp_path, out)
    rule = "checkpoint must be a file, a folder of shards with a .metadata or a run with a latest-rank0.pt"
    assert message == f"{rule}, got {tmp_path}"
    assert "No such file" in refuse(export_weights, tmp_path / "none", out)
    assert not list(out.parent.iterdir())


def test_a_full_disk(published, out, monkeypatch):
    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pss_composer.checkpoints.export.save_file", save_half)
    message = refuse(export_weights, published["simmim"], out, key="out")
    assert "out must be a file that can be written" in message and "No space left" in message
    assert list(out.parent.iterdir()) == []


# the commands

def test_commands(run, published, tmp_path, out, capsys):
    main(["import-checkpoint", str(published["deit"]), str(out), "--ema", "--image-size", "16"])
    main(["export-checkpoint", str(run), str(out.with_stem("run")), "--ema", "--image-size", "48"])
    report, again = capsys.readouterr().out, tmp_path / "again"
    again.mkdir()
    expected = [export_weights(published["deit"], again / out.name, ema=True, image_size=16),
                export_weights(run, again / "run.safetensors", ema=True, image_size=48)]
    assert report.replace(str(out.parent), str(again)).splitlines() == "\n".join(expected).splitlines()
    for path in (out, out.with_stem("run")):
        assert read_timm_arguments(path) == read_timm_arguments(again / path.name)
        assert_same(load_file(path), load_file(again / path.name))


@pytest.mark.parametrize(("arguments", "message"), [
    (["import-checkpoint", "{tmp}/none.pth", "{out}"],
     "FILE must be readable, {tmp}/none.pth is not: No such file or directory"),
    (["import-checkpoint", "{file}", "{file}"], "OUT must be a new file with the suffix .safetensors, got {file}"),
    (["import-checkpoint", "{file}", "{out}", "--image-size", "30"],
     "--image-size must be a multiple of the patch size 4, got 30"),
    (["import-checkpoint", "{file}", "{out}", "--ema"],
     "--ema needs a checkpoint with moving averages, {file} has none"),
    (["export-checkpoint", "{tmp}", "{out}"],
     "RUN must be a file, a folder of shards with a .metadata or a run with a latest-rank0.pt, got {tmp}"),
])
def test_commands_name_what_the_user_typed(published, tmp_path, out, arguments, message):
    places = {"tmp": tmp_path, "out": out, "file": published["simmim"]}
    with pytest.raises(SystemExit) as end:
        main([argument.format(**places) for argument in arguments])
    assert end.value.code == f"error: {message.format(**places)}"
    assert not list(out.parent.iterdir())


@pytest.mark.slow
def test_a_command_in_a_process_of_its_own(published, tmp_path, out, capsys):
    """What a user sees, and the exit status: of a hostile file in a process, of a good one in this one."""
    hostile = simmim_file("simmim")
    hostile["config"]["MODEL"]["VIT"]["EXTRA"] = CALLS["posix.system"](tmp_path / "marker")
    path = save(hostile, tmp_path / "hostile.pth")
    command = [sys.executable, "-m", "pss_composer", "import-checkpoint", path, out.with_stem("hostile")]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120, env=os.environ)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: \w+ must hold weights and settings alone, .* asks for posix.system: refused, "
                        "and nothing of it was run\n", result.stderr)
    main(["import-checkpoint", str(published["simmim"]), str(out)])
    report = capsys.readouterr()
    assert report.err == "" and "loaded: 39" in report.out
    assert not (tmp_path / "marker").exists() and list(out.parent.iterdir()) == [out]
    assert_close(logits_of(load_into_timm(out), "simmim"), reference_logits("simmim"))
