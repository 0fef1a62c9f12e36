"""What models take from a file, in every combination of layout and model; and what they refuse."""

import re

import pytest
import torch
from support.checkpoint_checks import (
    PRETRAINING_ONLY,
    assert_close,
    assert_reconstructs,
    assert_same,
    copy_weights,
    logits_of,
    refuse,
)
from support.checkpoint_files import (
    BUILD,
    PRETRAINING_VECTORS,
    PUBLISHED,
    distilled_vit,
    reference_images,
    reference_logits,
    save,
    simmim_file,
    timm_vit_weights,
    vector_weights,
    with_weights,
    without_weight,
)
from support.checkpoint_runs import train
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import nn

from pss_composer.checkpoints.transfer import load_checkpoint, load_pretrained


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
    (lambda: without_weight(simmim_file("simmim"), "blocks.1.norm2.bias"), "simmim", {}, "has no blocks.1.norm2.bias"),
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
    assert re.search(message, refuse(load_pretrained, model, path))
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
        (published["simmim"], BUILD["simmim"](), "must be Composer's, .* is not: it can only be used as pretrained"),
    ]:
        before = copy_weights(other)
        assert re.search(message, refuse(load_checkpoint, other, path))
        assert_same(other.state_dict(), before)
