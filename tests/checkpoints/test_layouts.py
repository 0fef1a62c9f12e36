"""Files in every layout: their weights are found, under timm's names and whole."""

import zipfile
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoint_checks import (
    PRETRAINING_ONLY,
    TITLES,
    assert_close,
    assert_reconstructs,
    assert_same,
    copy_weights,
    load_into_timm,
    logits_of,
    read_account,
    refuse,
    together,
)
from support.checkpoint_files import (
    BUILD,
    FORMATS,
    PUBLISHED,
    as_state_dict,
    deit_pss_file,
    distilled_vit,
    reference_images,
    reference_logits,
    save,
    simmim_file,
    vector_weights,
    with_weights,
)

from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.layouts import read_weights
from pss_composer.checkpoints.transfer import load_checkpoint, load_pretrained
from pss_composer.pretraining.simmim import SimMIM


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(tmp_path, out, name, kind):
    contents = PUBLISHED[name]()
    report = export_weights(save(contents, tmp_path / "file.pth", kind), out)
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
    assert read_account(export_weights(out, again)) == {title: Counter() for title in TITLES} | {
        "loaded": together(weights)}
    assert_same(load_file(again), weights)


def test_a_compressed_zip(tmp_path, out):
    path, compressed = save(simmim_file("simmim"), tmp_path / "file.pth"), tmp_path / "compressed.pth"
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    export_weights(compressed, out)
    assert_same(load_file(out), vector_weights("simmim"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, out, dtype):
    weights = {name: weight.to(dtype) for name, weight in vector_weights("simmim").items()}
    path = save({"model": weights}, tmp_path / "file.pth")
    export_weights(path, out)
    assert_same(load_file(out), weights)
    model = BUILD["simmim"]()
    load_pretrained(model, path)
    assert_same(model.vit.state_dict(), {name: weight.float() for name, weight in weights.items()})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["simmim", "pretraining"])
def test_bare_state_dicts(tmp_path, out, name, prefix):
    weights = {prefix + key: weight for key, weight in as_state_dict(vector_weights(name)).items()}
    report = export_weights(save(weights, tmp_path / "file.pth"), out)
    assert read_account(report)["loaded"] == together(load_file(out)) and "not weights" not in report
    vit = load_into_timm(out)
    if name == "simmim":
        assert_close(logits_of(vit, name), reference_logits(name))


def test_moving_averages_of_deit(tmp_path, out):
    path = save(deit_pss_file(), tmp_path / "file.pth")
    assert "its moving averages" in export_weights(path, out, ema=True)
    assert_same(load_file(out), {name: 2 * weight for name, weight in vector_weights("deit").items()})


def test_weights_that_share_memory(tmp_path, out):
    weights = vector_weights("simmim")
    tables = [name for name in weights if name.endswith("bias_table")]
    shared = dict.fromkeys(tables, weights[tables[0]])
    export_weights(save({"model": {**weights, **shared}}, tmp_path / "file.pth"), out)
    assert_same(load_file(out), {**weights, **shared})


def test_read_weights_names_what_is_no_weight(published):
    weights = read_weights(published["deit"])
    assert weights.not_weights == ["optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"]
    assert weights.tensors.keys() == vector_weights("deit").keys()


def test_two_weights_of_one_name(tmp_path, out):
    weights = vector_weights("simmim")
    path = save({"model": weights | {"encoder.cls_token": weights["cls_token"]}}, tmp_path / "two.pth")
    assert "must hold each weight once" in refuse(export_weights, path, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, out, value, dtype):
    weight = vector_weights("simmim")["blocks.1.mlp.fc2.weight"].to(dtype, copy=True)
    weight[3, 5] = value
    contents = with_weights(simmim_file("simmim"), blocks__1__mlp__fc2__weight=weight)
    path = save(contents, tmp_path / "file.pth")
    message = f"checkpoint must hold finite weights, {path} has NaN or infinity at blocks.1.mlp.fc2.weight"
    assert refuse(export_weights, path, out) == message and not list(out.parent.iterdir())
    model = BUILD["simmim"]()
    before = copy_weights(model)
    assert refuse(load_pretrained, model, path) == message
    path = save({"state": {"model": contents["model"]}}, tmp_path / "file.pt")
    assert refuse(load_checkpoint, model, path) == message.replace("file.pth", "file.pt")
    assert_same(model.state_dict(), before)


def test_averages_that_are_not_read_may_be_infinite(tmp_path, out):
    contents = deit_pss_file()
    contents["model_ema"]["cls_token"][:] = float("inf")
    path = save(contents, tmp_path / "file.pth")
    assert "at cls_token" in refuse(export_weights, path, out, ema=True)
    export_weights(path, out)
    assert_same(load_file(out), vector_weights("deit"))
