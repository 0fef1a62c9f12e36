"""Checkpoints in every layout; hostile and broken files; and what models take from them."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy
import pytest
import timm
import torch
from support.checkpoint_files import (
    PRETRAINING_VECTORS,
    PUBLISHED,
    ROOT,
    SMALL,
    as_state_dict,
    deit_pss_file,
    distilled_vit,
    reference_images,
    reference_logits,
    simmim_file,
    timm_vit_weights,
    train,
    vector_weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.launch import launch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from yacs.config import CfgNode

from pss_composer.__main__ import main
from pss_composer.checkpoints import LATEST, import_checkpoint, load_checkpoint, load_pretrained, read_weights
from pss_composer.checkpoints.reading import read_file
from pss_composer.errors import InputError
from pss_composer.models import DeiT, SimMIM, SimMIMClassifier
from pss_composer.models.simmim import build_encoder

CLASSES = {vit_class.__name__: vit_class for vit_class in (Beit, VisionTransformer, VisionTransformerDistilled)}
TITLES = {"loaded", "copied from the shared bias table", "interpolated", "dropped", "left at initial values"}
PRETRAINING_ONLY = {"mask_token", "decoder.weight", "decoder.bias", "encoder.rel_pos_bias.relative_position_index"}
FORMATS = {"zip": True, "legacy": False}


@pytest.fixture
def out(tmp_path):
    """Where a command writes; nothing else may be in this folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "vit.safetensors"


def save(contents, path, kind="zip"):
    torch.save(contents, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def load_into_timm(path, **arguments):
    """The timm model that a file's metadata name, with its weights; the arguments are those that weights do not show.
    """
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["timm"])
    unknown = {name for name, value in description["arguments"].items() if value is None and name != "init_values"}
    assert unknown == set(arguments)
    model = CLASSES[description["class"]](**description["arguments"] | arguments)
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def read_account(report):
    """The title of a line -> its names, those of the blocks taken together -> how often; and the counts add up."""
    account = {title: Counter() for title in TITLES}
    for line in report.splitlines():
        title, _, names = line.partition(": ")
        if title in TITLES:
            total, names = re.fullmatch(r"(\d+) \((.*)\)", names).groups()
            account[title] = Counter({name: int(count or 1) for name, count in
                                      re.findall(r"([\w.*]+)(?: \((\d+) x\))?(?:, |$)", names)})
            assert account[title].total() == int(total)
    return account


def together(names):
    return Counter(re.sub(r"blocks\.\d+", "blocks.*", name) for name in names)


def refuse(*arguments):
    """The message of a command that stops at bad input."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    message = end.value.code
    assert isinstance(message, str) and message.startswith("error: ") and len(message) < 500
    assert not re.search(r"[\n\x1b]|Traceback|add_safe_globals|likely succeed|trusted", message)
    return message


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def assert_same(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state_dict[name], weight), name


def copy_weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def reconstruct(model):
    batch = PRETRAINING_VECTORS.get_tensor("input"), PRETRAINING_VECTORS.get_tensor("mask").bool()
    outputs = model(batch)
    return model.unpatchify(outputs.pixels), model.loss(outputs, batch)


def assert_reconstructs(model):
    painted, loss = reconstruct(model)
    assert_close(painted, PRETRAINING_VECTORS.get_tensor("reconstruction"))
    assert_close(loss, PRETRAINING_VECTORS.get_tensor("loss"))


def logits_of(model, name):
    return model.eval()(reference_images(name)).detach()


# import

@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(tmp_path, out, capsys, name, kind):
    contents = PUBLISHED[name]()
    main(["import-checkpoint", str(save(contents, tmp_path / "file.pth", kind)), str(out)])
    report = capsys.readouterr().out
    account, weights = read_account(report), load_file(out)
    dropped = {key for key in contents["model"] if key.endswith("relative_position_index")}
    if name == "pretraining":
        dropped = PRETRAINING_ONLY
        vit = load_into_timm(out)
        model = SimMIM(vit)  # its mask token and decoder are of the vectors
        original = vector_weights("pretraining")
        model.encoder.patch_embed.norm.mask_token.data = original["encoder.mask_token"]
        model.decoder.weight.data = original["decoder.0.weight"].flatten(1)
        model.decoder.bias.data = original["decoder.0.bias"]
        assert_reconstructs(model.train())
    elif name == "distilled":
        images = reference_images("deit")
        assert_close(load_into_timm(out, num_heads=4)(images), distilled_vit().eval()(images))
    else:
        unknown = {"num_heads": 4} if name == "vit" else {}
        images = reference_images("deit" if name == "deit" else "simmim" if name == "simmim" else "ape_cls")
        expected = reference_logits("ape_cls" if name == "vit" else name)
        assert_close(load_into_timm(out, **unknown)(images), expected)
    # of the file's weights, none is lost; of the model's, none has another origin
    assert account["loaded"] == together(weights)
    assert account["dropped"] == together(dropped)
    original_names = {"encoder.mask_token": "mask_token", "decoder.0.weight": "decoder.weight",
                      "decoder.0.bias": "decoder.bias"}
    names = [original_names.get(key, key if key in dropped else key.removeprefix("encoder."))
             for key in contents["model"]]
    assert sum(account.values(), Counter()) == together(names)
    others = [key for key in contents if key != "model"]
    assert (f"not weights, left out: {', '.join(others)}" in report) == bool(others)
    assert list(out.parent.iterdir()) == [out]
    again = tmp_path / "again.safetensors"
    assert read_account(import_checkpoint(out, again)) == {title: Counter() for title in TITLES} | {
        "loaded": together(weights)}
    assert_same(load_file(again), weights)


def test_a_compressed_zip(tmp_path, out):
    path, compressed = save(simmim_file("simmim"), tmp_path / "file.pth"), tmp_path / "compressed.pth"
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    import_checkpoint(compressed, out)
    assert_same(load_file(out), vector_weights("simmim"))


def test_half_precision(tmp_path, out):
    weights = {name: weight.half() for name, weight in vector_weights("simmim").items()}
    path = save({"model": weights}, tmp_path / "file.pth")
    import_checkpoint(path, out)
    assert_same(load_file(out), weights)
    model = BUILD["simmim"]()
    load_pretrained(model, path)
    assert_same(model.vit.state_dict(), {name: weight.float() for name, weight in weights.items()})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["simmim", "pretraining"])
def test_bare_state_dicts(tmp_path, out, name, prefix):
    weights = {prefix + key: weight for key, weight in as_state_dict(vector_weights(name)).items()}
    report = import_checkpoint(save(weights, tmp_path / "file.pth"), out)
    assert read_account(report)["loaded"] == together(load_file(out)) and "not weights" not in report
    vit = load_into_timm(out)
    if name == "simmim":
        assert_close(logits_of(vit, name), reference_logits(name))


def test_moving_averages_of_deit(tmp_path, out, capsys):
    path = save(deit_pss_file(), tmp_path / "file.pth")
    main(["import-checkpoint", str(path), str(out), "--ema"])
    assert "its moving averages" in capsys.readouterr().out
    assert_same(load_file(out), {name: 2 * weight for name, weight in vector_weights("deit").items()})


def test_weights_that_share_memory(tmp_path, out):
    weights = vector_weights("simmim")
    tables = [name for name in weights if name.endswith("bias_table")]
    shared = dict.fromkeys(tables, weights[tables[0]])
    import_checkpoint(save({"model": {**weights, **shared}}, tmp_path / "file.pth"), out)
    assert_same(load_file(out), {**weights, **shared})


def test_another_image_size(tmp_path, out):
    weights = vector_weights("deit")
    main(["import-checkpoint", str(save({"model": weights}, tmp_path / "file.pth")), str(out), "--image-size", "16"])
    model = load_into_timm(out)
    assert model.patch_embed.grid_size == (4, 4)
    for name, weight in model.state_dict().items():
        if name == "pos_embed":
            expected = resample_abs_pos_embed(weights[name], [4, 4], num_prefix_tokens=1)
        elif name.endswith("relative_position_bias_table"):
            expected = resize_rel_pos_bias_table(weights[name], (4, 4), (7 * 7 + 3, 4))
        else:
            expected = weights[name]
        assert torch.equal(weight, expected)


def random_weights(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2).add_(0.1)
    return model.eval()


TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32},
    "vit_base_patch16_224": {"img_size": 32, "global_pool": "avg"},
    "vit_small_patch16_224": {"img_size": 64, "num_classes": 0},
    "vit_base_patch16_224_miil": {"img_size": 48},  # no bias of query, key and value
    "deit_small_distilled_patch16_224": {"img_size": 32},
    "deit3_small_patch16_224": {"img_size": 32},
    "vit_small_patch14_dinov2": {"img_size": 42},
    "vit_small_patch14_reg4_dinov2": {"img_size": 42},
    "beit_base_patch16_224": {"img_size": 32},
    "beitv2_large_patch16_224": {"img_size": 32, "num_classes": 0},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", TIMM)
def test_timm(tmp_path, out, name, suffix):
    arguments = {"num_classes": 7, "embed_dim": 32, "depth": 2, "num_heads": 4, **TIMM[name]}
    model = random_weights(timm.create_model(name, **arguments))
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path, {"format": "pt"})
    account = read_account(import_checkpoint(path, out))
    assert account["loaded"] == sum(account.values(), Counter()) == together(model.state_dict())
    again = load_into_timm(out, **({} if "beit" in name else {"num_heads": 4}))
    images = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    assert torch.equal(again.forward_features(images), model.forward_features(images))
    if arguments["num_classes"]:  # without a head, weights do not show the pooling
        assert torch.equal(again(images), model(images))
    # timm's own way to another image size, in the model
    size = 3 * arguments["img_size"]
    model.set_input_size(size)
    out.unlink()
    import_checkpoint(path, out, image_size=size)
    again = load_into_timm(out, **({} if "beit" in name else {"num_heads": 4}))
    images = torch.randn(2, 3, size, size)
    assert torch.equal(again.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("name", [
    "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_256", "vit_base_patch16_xp_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3",
    "vit_base_patch16_rpn_224", "vit_relpos_small_patch16_224", "deit_tiny_patch16_224-without-position",
    "cait_xxs24_224", "convit_tiny",
])
def test_timm_of_other_kinds(tmp_path, out, name):
    name, is_without_position, _ = name.partition("-")
    model = timm.create_model(name, depth=1, **{"pos_embed": "none"} if is_without_position else {})
    message = refuse("import-checkpoint", save(model.state_dict(), tmp_path / "file.pth"), out)
    assert "checkpoint must be of a ViT of timm's, DeiT's or SimMIM's kind" in message
    assert not list(out.parent.iterdir())


# this project's own checkpoints

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under EMA that stopped within an epoch, after three batches; a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, stop_at=3)
    return folder


def average_by_hand(run):
    """The moving average of three batches: it starts after the first, and falls by half in three."""
    averages = None
    for batch in (1, 2, 3):
        state = torch.load(run / f"ep0-ba{batch}-rank0.pt", weights_only=False)["state"]
        ema = next(state for name, state in state["algorithms"] if name == "EMA")
        assert ema["ema_weights_active"]  # then Composer keeps what is trained in the place of the averages
        weights, keep = ema["ema_model"]["named_parameters_dict"], 2 ** (-1 / 3)
        averages = weights if averages is None else {
            name: keep * averages[name] + (1 - keep) * weight for name, weight in weights.items()}
    return {name.removeprefix("module."): weight for name, weight in averages.items()}


@pytest.mark.parametrize("source", ["", "latest-rank0.pt", "ep0-ba3-rank0.pt"])
def test_export_of_a_run_under_ema(run, out, capsys, source):
    state = torch.load(run / "ep0-ba3-rank0.pt", weights_only=False)["state"]
    main(["export-checkpoint", str(run / source), str(out), "--ema"])
    assert "a Composer checkpoint, its moving averages" in capsys.readouterr().out
    weights = load_file(out)
    assert_same(weights, {name.removeprefix("module."): weight for name, weight in state["model"].items()})
    for name, expected in average_by_hand(run).items():
        assert_close(weights[name], expected)
    load_into_timm(out)
    out.unlink()
    main(["export-checkpoint", str(run / source), str(out)])
    assert "averages" not in capsys.readouterr().out
    ema = next(ema for name, ema in state["algorithms"] if name == "EMA")
    trained = ema["ema_model"]["named_parameters_dict"]
    assert_same(load_file(out), {name.removeprefix("module."): weight for name, weight in trained.items()})
    assert_same(read_weights(run).tensors, weights)  # of the last checkpoint
    # a model starts from what Composer saved, and evaluates
    assert_same(read_weights(run / LATEST).tensors, weights)


def test_export_of_a_checkpoint_that_composer_saved_without_the_swap(run, tmp_path, out):
    contents = torch.load(run / "latest-rank0.pt", weights_only=False)
    ema = next(state for name, state in contents["state"]["algorithms"] if name == "EMA")
    averages = ema["ema_model"]["named_parameters_dict"]
    ema["ema_weights_active"] = False
    path = save(contents, tmp_path / "file.pt")
    main(["export-checkpoint", str(path), str(out), "--ema"])
    assert_same(load_file(out), {name.removeprefix("module."): weight for name, weight in averages.items()})
    out.unlink()
    ema["ema_started"] = False
    message = refuse("export-checkpoint", save(contents, path), out, "--ema")
    assert "ema must be of a checkpoint with moving averages" in message


@pytest.mark.parametrize(("settings", "expected"), [
    ("{size: tiny, num_heads: null}", 3),  # DeiT-Ti has 3 heads
    ("{size: tiny, num_heads: 4}", 4),
    (None, None),
])
def test_number_of_heads_of_a_run_is_its_recipes(tmp_path, out, capsys, settings, expected):
    model = DeiT("tiny", image_size=16, patch_size=4, num_classes=7, depth=1, num_heads=4)
    path = save({"state": {"model": model.state_dict()}}, tmp_path / "ep1-ba1-rank0.pt")
    if settings:
        (tmp_path / "recipe.yaml").write_text(f"model: {settings}")
    main(["export-checkpoint", str(path), str(out)])
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["timm"])["arguments"]["num_heads"] == expected
    assert f"num_heads, which the weights do not show: {expected} (" in capsys.readouterr().out


def test_number_of_heads_stays_in_an_export_and_must_be_the_models(tmp_path, out):
    shape = dict(image_size=16, patch_size=4, num_classes=7, depth=1)
    path = save({"state": {"model": DeiT("tiny", **shape, num_heads=4).state_dict()}}, tmp_path / "ep1-ba1-rank0.pt")
    (tmp_path / "recipe.yaml").write_text("model: {size: tiny, num_heads: 4}")
    main(["export-checkpoint", str(path), str(out)])
    again = out.with_name("again.safetensors")
    main(["import-checkpoint", str(out), str(again)])
    with safe_open(again, framework="pt") as file:
        assert json.loads(file.metadata()["timm"])["arguments"]["num_heads"] == 4
    for source in (path, out):
        load_pretrained(DeiT("tiny", **shape, num_heads=4), source)
        with pytest.raises(InputError, match="has 4 heads, the model 3"):
            load_pretrained(DeiT("tiny", **shape), source)


@pytest.mark.parametrize("metadata", [None, {}, {"timm": "{"}, {"timm": "{}"}, {"timm": "[1]"}])
def test_metadata_that_do_not_tell_the_number_of_heads(tmp_path, metadata):
    save_file(timm_vit_weights(), tmp_path / "vit.safetensors", metadata)
    assert read_weights(tmp_path / "vit.safetensors").num_heads is None


@pytest.mark.parametrize("recipe", ["{}", "model: null", "model: {size: huge}", "a: [1"])
def test_a_recipe_that_does_not_tell_the_number_of_heads(tmp_path, out, recipe):
    model = DeiT("tiny", image_size=16, patch_size=4, num_classes=7, depth=1)
    path = save({"state": {"model": model.state_dict()}}, tmp_path / "ep1-ba1-rank0.pt")
    (tmp_path / "recipe.yaml").write_text(recipe)
    main(["export-checkpoint", str(path), str(out)])
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["timm"])["arguments"]["num_heads"] is None


@pytest.mark.parametrize(("embed_dim", "expected"), [(192, 3), (384, 6), (200, None)])
def test_number_of_heads_of_a_published_vit_is_that_of_its_width(tmp_path, out, embed_dim, expected):
    vit = VisionTransformer(img_size=16, patch_size=4, num_classes=7, embed_dim=embed_dim, depth=1, num_heads=4)
    main(["import-checkpoint", str(save({"model": vit.state_dict()}, tmp_path / "deit.pth")), str(out)])
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["timm"])["arguments"]["num_heads"] == expected


@pytest.mark.parametrize("kind", ["classifier", "pretraining"])
def test_export_is_the_model_of_the_run(tmp_path, out, capsys, kind):
    trainer = train(tmp_path / "run", is_pretraining=kind == "pretraining", ema=False, stop_at=5)
    vit = trainer.state.model.vit.eval()
    main(["export-checkpoint", str(tmp_path / "run"), str(out)])
    account = read_account(capsys.readouterr().out)
    exported, images = load_into_timm(out), reference_images("simmim")
    assert account["loaded"] == together(exported.state_dict())
    assert account["dropped"] == Counter(PRETRAINING_ONLY - {"encoder.rel_pos_bias.relative_position_index"}
                                         if kind == "pretraining" else ())
    if kind == "pretraining":
        vit.patch_embed.norm = nn.Identity()
    assert torch.equal(exported.forward_features(images), vit.forward_features(images))
    assert torch.equal(exported(images), vit(images))
    out.unlink()
    main(["export-checkpoint", str(tmp_path / "run"), str(out), "--image-size", "48"])
    assert load_into_timm(out)(torch.zeros(1, 3, 48, 48)).isfinite().all()
    out.unlink()
    assert "moving averages" in refuse("export-checkpoint", tmp_path / "run", out, "--ema")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The same run on two processes, with sharded checkpoints."""
    folder = tmp_path_factory.mktemp("sharded")
    launch("tests/checkpoint_files.py", str(folder / "run"), log=folder / "log.txt")
    return folder / "run"


@pytest.mark.parametrize("source", ["", "latest-rank0.pt", "ep0-ba3"])
def test_shards(sharded, out, source):
    expected = torch.load(sharded / "expected.pt")
    main(["export-checkpoint", str(sharded / source), str(out), "--ema"])
    assert_same(load_file(out), {name.removeprefix("module."): weight for name, weight in expected.items()})
    load_into_timm(out)
    for load in (load_pretrained, load_checkpoint):
        model = SimMIMClassifier(**SMALL, num_classes=7)
        load(model, sharded / (source or "latest-rank0.pt"))
        assert_same(model.state_dict(), expected)


# into a model

BUILD = {
    "pretraining": lambda **options: SimMIM(build_encoder(**SMALL | options)),
    "simmim": lambda **options: SimMIMClassifier(**SMALL | {"num_classes": 7} | options),
    "vit": lambda **options: DeiT(**SMALL | {"num_classes": 7} | options),
    "distilled": lambda **options: DeiT(**SMALL | {"num_classes": 7} | options, is_distilled=True),
    "deit": lambda **options: DeiT(**SMALL | {"num_classes": 7} | options, relative_position_bias=True),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A name -> the published file of that name."""
    folder = tmp_path_factory.mktemp("published")
    return {name: save(build(), folder / f"{name}.pth") for name, build in PUBLISHED.items()}


@pytest.mark.parametrize("name", BUILD)
def test_pretrained_of_the_same_model(published, name):
    model = BUILD[name]()
    transfer = load_pretrained(model, published[name])
    assert len(transfer.loaded) == len(model.state_dict())
    assert not (transfer.copied or transfer.interpolated or transfer.initial)
    assert all(key.endswith("relative_position_index") for key in transfer.dropped)
    if name == "pretraining":
        assert_reconstructs(model)
    elif name == "distilled":
        images = reference_images("deit")
        assert_close(model.vit.eval()(images), distilled_vit().eval()(images))
    else:
        weights = timm_vit_weights() if name == "vit" else vector_weights(name)
        assert_same(model.vit.state_dict(), weights)
        vector = "ape_cls" if name == "vit" else name
        assert_close(logits_of(model.vit, vector), reference_logits(vector))


def test_fine_tuning_from_pre_training(published):
    model, weights = BUILD["simmim"](), vector_weights("pretraining")
    before = copy_weights(model.vit)
    transfer = load_pretrained(model, published["pretraining"])
    tables = {f"blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)}
    head = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(transfer.copied) == tables and set(transfer.initial) == head and not transfer.interpolated
    assert set(transfer.loaded) == set(before) - tables - head
    assert set(transfer.dropped) == PRETRAINING_ONLY | {"norm.weight", "norm.bias"}
    for name, weight in model.vit.state_dict().items():
        if name in head:
            assert torch.equal(weight, before[name])
        elif name in tables:
            assert torch.equal(weight, weights["encoder.rel_pos_bias.relative_position_bias_table"])
        else:
            assert torch.equal(weight, weights[f"encoder.{name}"])
    # the same features as the pre-trained encoder has, before the norm that stays behind
    encoder = BUILD["pretraining"]()
    load_pretrained(encoder, published["pretraining"])
    encoder.encoder.norm, encoder.encoder.patch_embed.norm = nn.Identity(), nn.Identity()
    images = PRETRAINING_VECTORS.get_tensor("input")
    assert_close(model.vit.forward_features(images), encoder.encoder.forward_features(images))


def split(names):
    return {name.split()[0] for name in names}


@pytest.mark.parametrize("options", [{"image_size": 48}, {"image_size": 16}, {"patch_size": 8},
                                     {"image_size": 48, "patch_size": 8}])
@pytest.mark.parametrize(("file", "target"), [("pretraining", "simmim"), ("deit", "deit"), ("vit", "vit"),
                                              ("pretraining", "pretraining"), ("distilled", "distilled")])
def test_another_grid(published, file, target, options):
    model = BUILD[target](**options)
    before = copy_weights(model.vit)
    transfer = load_pretrained(model, published[file])
    weights = PUBLISHED[file]()["model"]
    weights = {name.removeprefix("encoder."): weight for name, weight in weights.items()}
    shared = weights.get("rel_pos_bias.relative_position_bias_table")
    side, patch_size = model.vit.patch_embed.grid_size[0], model.vit.patch_embed.patch_size[0]
    interpolated = set()
    for name, weight in model.vit.state_dict().items():
        name = name.replace("patch_embed.norm.mask_token", "mask_token")
        source = weights.get(name, shared if name.endswith("table") else None)
        expected = source
        if source is None:
            expected = before[name]
        elif name == "pos_embed":
            expected = resample_abs_pos_embed(source, [side, side], num_prefix_tokens=2 if file == "distilled" else 1)
        elif name.endswith("table"):
            expected = resize_rel_pos_bias_table(source, (side, side), ((2 * side - 1) ** 2 + 3, 4))
        elif name == "patch_embed.proj.weight":
            expected = resample_patch_embed(source, [patch_size, patch_size])
        assert torch.equal(weight, expected), name
        if source is not None and expected.shape != source.shape:
            interpolated.add(name)
    assert interpolated and split(transfer.interpolated) == interpolated
    accounted = split([*transfer.loaded, *transfer.copied, *transfer.interpolated, *transfer.initial])
    assert accounted == {name.replace("encoder.", "").replace("patch_embed.norm.", "").replace("module.", "")
                         for name in model.state_dict()}


def test_another_number_of_classes(published):
    model = BUILD["simmim"](num_classes=5)
    before = copy_weights(model.vit)
    transfer = load_pretrained(model, published["simmim"])
    assert set(transfer.initial) == {"head.weight", "head.bias"}
    assert {"head.weight (7, 32)", "head.bias (7,)"} <= set(transfer.dropped)
    after = model.vit.state_dict()
    assert_same(after, vector_weights("simmim") | {name: before[name] for name in transfer.initial})


def without(contents, name):
    return {**contents, "model": {key: weight for key, weight in contents["model"].items() if key != name}}


def with_weights(contents, **weights):
    return {**contents, "model": contents["model"] | {name.replace("__", "."): w for name, w in weights.items()}}


@pytest.mark.parametrize(("file", "target", "options", "message"), [
    ("simmim", "vit", {}, "has no pos_embed"),
    ("deit", "simmim", {}, "has no blocks.0.gamma_1"),
    ("vit", "deit", {}, "has no blocks.0.attn.q_bias"),
    ("vit", "distilled", {}, r"has \(1, 65, 32\) at pos_embed, the model \(1, 66, 32\)"),
    ("distilled", "vit", {}, r"has \(1, 66, 32\) at pos_embed, the model \(1, 65, 32\)"),
    ("simmim", "pretraining", {}, "has no rel_pos_bias.relative_position_bias_table"),
    ("pretraining", "deit", {}, "has no pos_embed"),
    ("simmim", "simmim", {"embed_dim": 16}, r"has \(1, 1, 32\) at cls_token, the model \(1, 1, 16\)"),
    ("pretraining", "simmim", {"num_heads": 2}, r"has \(228, 4\) at .*bias_table, the model \(228, 2\)"),
    ("simmim", "simmim", {"depth": 3}, "has no blocks.2"),
    ("simmim", "simmim", {"depth": 1}, "has blocks.1.* the model has not"),
    (lambda: without(simmim_file("simmim"), "blocks.1.norm2.bias"), "simmim", {}, "has no blocks.1.norm2.bias"),
    (lambda: with_weights(simmim_file("simmim"), extra=torch.zeros(1)), "simmim", {}, "has extra, the model has not"),
    (lambda: with_weights(simmim_file("simmim"), blocks__1__norm2__bias=torch.zeros(32, device="meta")), "simmim", {},
     "must hold weights"),
    (lambda: with_weights(simmim_file("simmim"), blocks__1__norm2__bias=torch.zeros(32).to_sparse()), "simmim", {},
     "must hold weights"),
    (lambda: [1, 2], "simmim", {}, "must hold a dictionary"),
])
def test_a_model_is_unchanged_by_an_error(published, tmp_path, file, target, options, message):
    path = save(file(), tmp_path / "file.pth") if callable(file) else published[file]
    model = BUILD[target](**options)
    before = copy_weights(model)
    with pytest.raises(InputError, match=message) as error:
        load_pretrained(model, path)
    assert "\n" not in str(error.value)
    assert_same(model.state_dict(), before)


def test_load_checkpoint_is_strict(run, published, tmp_path):
    latest = run / "latest-rank0.pt"
    model = BUILD["simmim"]()
    load_checkpoint(model, latest)
    assert_same(model.state_dict(), torch.load(latest, weights_only=False)["state"]["model"])
    train(tmp_path, is_pretraining=True, ema=False, stop_at=1)
    pretrained = BUILD["pretraining"]()
    load_checkpoint(pretrained, tmp_path / "latest-rank0.pt")
    for path, other, message in [
        (latest, BUILD["simmim"](image_size=16), "must be of the same model, .* differs in blocks.0.attn.relative"),
        (latest, BUILD["simmim"](num_classes=5), "must be of the same model, .* differs in head.weight"),
        (latest, BUILD["deit"](), "has no pos_embed"),
        (tmp_path / "latest-rank0.pt", BUILD["simmim"](), "must be of the same model"),
        (published["simmim"], BUILD["simmim"](), "must be Composer's, .* is none: model.pretrained takes it"),
    ]:
        before = copy_weights(other)
        with pytest.raises(InputError, match=message):
            load_checkpoint(other, path)
        assert_same(other.state_dict(), before)


# hostile files

class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


CALLS = {
    "posix.system": lambda marker: Hostile(os.system, f"touch {marker}"),
    "eval": lambda marker: Hostile(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Hostile(exec, f"open({str(marker)!r}, 'w').close()"),
    "getattr": lambda marker: Hostile(getattr, str(marker), "join"),
    "shutil.copy": lambda marker: Hostile(shutil.copy, __file__, str(marker)),
}


def put_in_config(contents, hostile):
    contents["config"]["MODEL"]["VIT"]["EXTRA"] = [{"deep": (hostile,)}]


def put_in_place_of_a_tensor(contents, hostile):
    contents["model"]["blocks.1.norm1.weight"] = hostile


def put_in_a_key(contents, hostile):
    contents["optimizer"]["state"][hostile] = 1


def put_in_arguments(contents, hostile):
    contents["args"] = argparse.Namespace(lr=0.1, extra=hostile)


def put_in_an_attribute(contents, hostile):
    contents["model"]._metadata = hostile


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("put", "call"), [
    *((put_in_config, call) for call in CALLS),
    *((put, "posix.system") for put in (put_in_place_of_a_tensor, put_in_a_key, put_in_arguments, put_in_an_attribute)),
])
def test_a_hostile_file_does_nothing(tmp_path, out, put, call, kind):
    marker = tmp_path / "marker"
    contents = simmim_file("simmim")
    put(contents, CALLS[call](marker))
    path = save(contents, tmp_path / "file.pth", kind)
    message = refuse("import-checkpoint", path, out)
    assert f"{path} asks for {call}: refused, and nothing of it was run" in message
    model = BUILD["simmim"]()
    before = copy_weights(model)
    with pytest.raises(InputError, match="refused"):
        load_pretrained(model, path)
    assert_same(model.state_dict(), before)
    assert not marker.exists() and not list(out.parent.iterdir())
    if call != "getattr":
        torch.load(path, weights_only=False)
        assert marker.exists()  # so it was hostile


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_pickles_of_other_protocols_do_nothing(tmp_path, out, protocol):
    marker = tmp_path / "marker"
    torch.save({"config": CALLS["posix.system"](marker)}, tmp_path / "file.pth", pickle_protocol=protocol)
    assert "cannot be read" in (message := refuse("import-checkpoint", tmp_path / "file.pth", out)) or (
        "asks for posix.system" in message)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CALLS["posix.system"](marker), protocol))
    assert "must be a file of torch.save" in refuse("import-checkpoint", tmp_path / "plain.pth", out)
    assert not marker.exists()


def test_what_others_allow_torch_is_refused_too(tmp_path, out):
    """torch.distributed allows classes of its own, and so may any library."""
    with torch.serialization.safe_globals([CfgNode, Path]):
        before = torch.serialization.get_safe_globals()
        assert DeviceMesh in before
        for function, name in [(DeviceMesh, "torch.distributed.tensor"), (Path, r"pathlib.(\w+\.)?Path")]:
            path = save({"config": Hostile(function, "cpu")}, tmp_path / "file.pth")
            message = refuse("import-checkpoint", path, out)
            assert re.search(rf"asks for {name}: refused", message)
        contents = read_file(save(simmim_file("simmim"), tmp_path / "file.pth"))
        assert type(contents["config"]) is not CfgNode
        assert set(torch.serialization.get_safe_globals()) == set(before)


def test_objects_of_harmless_classes_are_not_made(tmp_path, monkeypatch):
    contents = simmim_file("simmim") | {"args": argparse.Namespace(lr=0.1)}
    contents["config"]["numbers"] = numpy.arange(3)
    path = save(contents, tmp_path / "file.pth")

    def fail(*args, **kwargs):
        raise AssertionError("a harmless class was used")

    for harmless in (CfgNode, argparse.Namespace):
        for name in ("__new__", "__init__", "__setstate__"):
            monkeypatch.setattr(harmless, name, fail, raising=False)
    for name in [name for name in sys.modules if name.startswith("yacs")]:
        monkeypatch.delitem(sys.modules, name)
    contents = read_file(path)
    assert not any(name.startswith("yacs") for name in sys.modules)
    stand_ins = [contents["config"], contents["config"]["MODEL"], contents["args"]]
    assert {type(stand_in).__module__ for stand_in in stand_ins} == {"pss_composer.checkpoints.reading"}
    assert not vars(contents["args"]) and not contents["args"]


def change_shards(folder, copy, name, content):
    """A copy of a folder of shards with other bytes at an entry."""
    shutil.copytree(folder, copy)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    index, info = next(item for item in metadata.storage_data.items() if item[0].fqn == name)
    shard = copy / info.relative_path
    metadata.storage_data[index] = dataclasses.replace(info, offset=shard.stat().st_size, length=len(content))
    shard.write_bytes(shard.read_bytes() + content)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    return copy


def to_bytes(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


@pytest.mark.parametrize("place", ["metadata", "planner_data", "state.algorithms", "state.model.module.cls_token"])
def test_hostile_shards_do_nothing(sharded, tmp_path, out, place):
    marker, copy = tmp_path / "marker", tmp_path / "shards"
    hostile = CALLS["posix.system"](marker)
    if place.startswith("state."):
        change_shards(sharded / "ep0-ba3", copy, place, to_bytes([("EMA", hostile)]))
    else:
        shutil.copytree(sharded / "ep0-ba3", copy)
        metadata = pickle.loads((copy / ".metadata").read_bytes())
        metadata.planner_data["extra"] = hostile
        (copy / ".metadata").write_bytes(pickle.dumps(hostile if place == "metadata" else metadata))
    message = refuse("import-checkpoint", copy, out)
    assert "asks for posix.system: refused, and nothing of it was run" in message
    assert not marker.exists() and not list(out.parent.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])


@pytest.mark.parametrize(("change", "message"), [
    (lambda copy: truncate(copy / ".metadata"), "must be a whole folder of shards"),
    (lambda copy: truncate(copy / "__0_0.distcp"), "must be a whole folder of shards"),
    (lambda copy: (copy / "__1_0.distcp").unlink(), "must be a whole folder of shards, .*__1_0.distcp"),
    (lambda copy: (copy / ".metadata").unlink(), "must be a file, a folder of shards with a .metadata"),
    (lambda copy: (copy / ".metadata").write_bytes(b""), "must be a whole folder of shards"),
    (lambda copy: (copy / ".metadata").write_bytes(pickle.dumps({})), "must be a whole folder of shards"),
])
def test_broken_shards(sharded, tmp_path, out, change, message):
    copy = tmp_path / "shards"
    shutil.copytree(sharded / "ep0-ba3", copy)
    change(copy)
    assert re.search(message, refuse("import-checkpoint", copy, out))
    assert not list(out.parent.iterdir())


# broken files

def swin():
    return SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2))


def write(content):
    def build(path):
        path.write_bytes(content)
    return build


def cut(share, kind):
    def build(path):
        if kind == "safetensors":
            save_file(vector_weights("simmim"), path)
        else:
            save(simmim_file("simmim"), path, kind)
        content = path.read_bytes()
        path.write_bytes(content[:int(share * len(content))])
    return build


def save_arrays(path):
    with path.open("wb") as file:
        numpy.savez(file, weight=numpy.zeros(3))


def save_with_a_broken_pickle(path):
    content = save(simmim_file("simmim"), path).read_bytes()
    start = content.index(b"relative_position_bias_table")
    path.write_bytes(content[:start] + bytes(200) + content[start + 200:])


def save_script(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def changed(name="simmim", **weights):
    return lambda path: save(with_weights({"model": vector_weights(name)}, **weights), path)


def renamed(prefix, other):
    return {name.replace(prefix, other): weight for name, weight in vector_weights("simmim").items()}


TABLE = "blocks__{}__attn__relative_position_bias_table"
BROKEN = {
    "html": (write(b"<!DOCTYPE html>\n<html>\n<body>\nNot found\n</body></html>"),
             "must be a file of torch.save or safetensors, .* begins with b'<!DOCTYPE"),
    "empty": (write(b""), "must be a file of torch.save or safetensors, .* begins with b''"),
    "text": (write(b"version {https://git-lfs}\n"), "must be a whole safetensors file"),
    "zip-0.5": (cut(0.5, "zip"), "must be a whole file, .* ends too early"),
    "zip-0.999": (cut(0.999, "zip"), "must be a whole file, .* ends too early"),
    "legacy-0.001": (cut(0.001, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "legacy-0.5": (cut(0.5, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "legacy-0.999": (cut(0.999, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "safetensors-0.5": (cut(0.5, "safetensors"), "must be a whole safetensors file, .* cannot be read"),
    "safetensors-0.01": (cut(0.01, "safetensors"), "must be a whole safetensors file, .* cannot be read"),
    "npz": (save_arrays, "must be a whole file of torch.save"),
    "broken-pickle": (save_with_a_broken_pickle, "must be a whole file of torch.save, .* cannot be read"),
    "script": (save_script, "must be a whole file of torch.save, .* TorchScript"),
    "list": (lambda path: save([torch.zeros(2)], path), "must hold a dictionary, .* holds a list"),
    "module": (lambda path: save({"model": nn.Linear(2, 2)}, path), "asks for torch.nn.modules.linear.Linear: refused"),
    "numbers": (lambda path: save({0: torch.zeros(2), 1: torch.zeros(3)}, path), "must hold weights under 'model'"),
    "nothing": (lambda path: save({}, path), "must hold weights under 'model'.* holds nothing"),
    "optimizer": (lambda path: save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, path),
                  "must hold weights under 'model'"),
    "composer": (lambda path: save({"state": {"model": [1], "algorithms": 3}}, path),
                 "must hold weights under 'model'"),
    "resnet": (lambda path: save({"model": timm.create_model("resnet18").state_dict()}, path),
               "has no cls_token, but conv1.weight"),
    "swin": (lambda path: save({"model": swin().state_dict()}, path), "has no cls_token, but patch_embed.proj.weight"),
    "missing-block": (lambda path: save(renamed("blocks.0.", "other."), path), "has no blocks.0.attn.qkv.weight"),
    "gap": (lambda path: save(renamed("blocks.1.", "blocks.2."), path), "has nothing at blocks.1."),
    "far-block": (changed(blocks__999999999__norm1__weight=torch.zeros(32)), "blocks.2.* has"),
    "no-number": (changed(blocks__first__norm1__weight=torch.zeros(32)), "do not fit together"),
    "missing-weight": (lambda path: save(without({"model": vector_weights("simmim")}, "blocks.1.mlp.fc2.bias"), path),
                       "has nothing at blocks.1.mlp.fc2.bias"),
    "extra-weight": (changed(blocks__1__mlp__fc3__bias=torch.zeros(3)), r"has \(3,\) at blocks.1.mlp.fc3.bias"),
    "width": (changed(blocks__1__mlp__fc1__weight=torch.zeros(64, 32)), r"has \(64, 32\) at blocks.1.mlp.fc1.weight"),
    "positions": (changed("deit", pos_embed=torch.zeros(1, 63, 32)), "pos_embed is for 62 patches, which are no"),
    "vit-positions": (changed("ape_cls", pos_embed=torch.zeros(1, 63, 32)), "pos_embed is for 62 patches"),
    "other-grids": (changed("deit", pos_embed=torch.zeros(1, 50, 32)), "at blocks.0.attn.relative_position_bias_table"),
    "heads": (changed(**{TABLE.format(1): torch.zeros(228, 2)}), r"has \(228, 2\) at blocks.1.*table"),
    "all-heads": (changed(**{TABLE.format(block): torch.zeros(228, 3) for block in (0, 1)}),
                  "width 32 with a bias table of 3 heads"),
    "no-heads": (changed(**{TABLE.format(block): torch.zeros(228, 0) for block in (0, 1)}), "do not fit together"),
    "table": (changed(**{TABLE.format(block): torch.zeros(230, 4) for block in (0, 1)}), "227 patches, which are"),
    "flat-table": (changed(**{TABLE.format(block): torch.zeros(228) for block in (0, 1)}), "do not fit together"),
    "scalars": (changed(head__weight=torch.tensor(1.0)), "do not fit together"),
    "stem": (changed(patch_embed__proj__weight=torch.zeros(32, 3, 4, 2)), "at patch_embed.proj.weight"),
    "no-patch": (changed("ape_cls", patch_embed__proj__weight=torch.zeros(32, 3, 0, 0)), "do not fit together"),
    "no-hidden": (changed(blocks__0__mlp__fc1__weight=torch.zeros(8, 0)), "do not fit together"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, out, name, recwarn):
    build, message = BROKEN[name]
    path = tmp_path / ("file.safetensors" if name.startswith("safetensors") else "file.pth")
    build(path)
    told = refuse("import-checkpoint", path, out)
    assert re.search(message, told) and str(path) in told
    assert not list(out.parent.iterdir())
    assert not recwarn.list
    if name not in ("scalars", "stem"):  # a head is left behind, a stem interpolated
        with pytest.raises(InputError) as error:
            load_pretrained(BUILD["simmim"](), path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("arguments", "message"), [
    (["{folder}/missing.pth", "{out}"], "checkpoint must be a file, no such file"),
    (["/proc/self/mem", "{out}"], "checkpoint must be a file that can be read, .* cannot: Input/output error"),
    (["{folder}", "{out}"], "checkpoint must be a file, a folder of shards"),
    (["{file}", "{folder}/there.safetensors"], "out must be a new file, .* is there already"),
    (["{file}", "{out}.bin"], "out must be a file with the suffix .safetensors"),
    (["{file}", "{folder}/none/vit.safetensors"], "out must be in a folder that can be written"),
    (["{file}", "{out}", "--image-size", "30"], "--image-size must be a multiple of the patch size 4, got 30"),
    (["{file}", "{out}", "--image-size", "0"], "--image-size must be a multiple of the patch size 4, got 0"),
    (["{file}", "{out}", "--image-size", "-4"], "--image-size must be a multiple of the patch size 4, got -4"),
    (["{file}", "{out}", "--ema"], "ema must be of a checkpoint with moving averages"),
])
@pytest.mark.parametrize("command", ["import-checkpoint", "export-checkpoint"])
def test_bad_arguments(published, tmp_path, out, command, arguments, message):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    places = {"folder": tmp_path, "out": out, "file": published["simmim"]}
    if command == "export-checkpoint" and arguments[0] == "{folder}":
        message = "run must be the save_folder of a trained recipe or a checkpoint, no latest-rank0.pt in"
    assert re.search(message, refuse(command, *(argument.format(**places) for argument in arguments)))
    assert there.read_bytes() == b"mine" and not list(out.parent.iterdir())
    assert set(tmp_path.iterdir()) == {there, out.parent}


def test_command_line(published, tmp_path, out):
    """In a process of its own: what a user sees, and the exit status."""
    hostile = simmim_file("simmim")
    put_in_config(hostile, CALLS["posix.system"](tmp_path / "marker"))
    save(hostile, tmp_path / "hostile.pth")

    command = [sys.executable, "-m", "pss_composer", "import-checkpoint"]
    processes = [
        subprocess.Popen([*command, *paths], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for paths in [(tmp_path / "hostile.pth", out.with_stem("hostile")), (published["simmim"], out)]
    ]
    (report, message), (other_report, other_message) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [1, 0]
    assert re.fullmatch("error: checkpoint must hold weights and settings alone, .* asks for posix.system: refused, "
                        "and nothing of it was run\n", message)
    assert report == "" and other_message == "" and "loaded: 39" in other_report
    assert not (tmp_path / "marker").exists() and list(out.parent.iterdir()) == [out]
    assert_close(logits_of(load_into_timm(out), "simmim"), reference_logits("simmim"))


def test_read_weights_names_what_is_no_weight(published):
    weights = read_weights(published["deit"])
    assert weights.not_weights == ["optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"]
    assert weights.tensors.keys() == vector_weights("deit").keys()


def test_two_weights_of_one_name(tmp_path, out):
    weights = vector_weights("simmim")
    path = save({"model": weights | {"encoder.cls_token": weights["cls_token"]}}, tmp_path / "two.pth")
    assert "must hold each weight once" in refuse("import-checkpoint", path, out)


def test_a_full_disk(tmp_path, out, monkeypatch):
    def save_nothing(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pss_composer.checkpoints.convert.save_file", save_nothing)
    path = save({"model": vector_weights("simmim")}, tmp_path / "file.pth")
    message = refuse("import-checkpoint", path, out)
    assert "out must be a file that can be written" in message and "No space left" in message
    assert list(out.parent.iterdir()) == []
