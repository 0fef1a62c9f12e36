"""The timm class and arguments that weights belong to."""

from collections import Counter

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.checkpoint_checks import load_into_timm, read_account, refuse, together
from support.checkpoint_files import save, vector_weights
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

from pss_composer.checkpoints.export import export_weights


def test_another_image_size(tmp_path, out):
    weights = vector_weights("deit")
    export_weights(save({"model": weights}, tmp_path / "file.pth"), out, image_size=16)
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
    account = read_account(export_weights(path, out))
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
    export_weights(path, out, image_size=size)
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
    message = refuse(export_weights, save(model.state_dict(), tmp_path / "file.pth"), out)
    assert "checkpoint must be of a ViT of timm's, DeiT's or SimMIM's kind" in message
    assert not list(out.parent.iterdir())
