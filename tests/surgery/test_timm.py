"""timm's families beyond the table: padded batches, unfused attention, other input sizes, feature maps, refusals."""

import copy

import pytest
import timm
import torch
from support.families.family import random_images
from support.families.timm import FAMILIES as TIMM
from support.families.timm import GRIDS, PADDED, SMALL, padded_images
from support.models import FAMILIES, build_model
from support.oracle import masked_logits
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit

from pss_composer import apply_patch_sampling
from pss_composer.errors import InputError
from pss_composer.sampling import num_keep

NUM_PATCHES = [height * width for height, width in GRIDS]
POSITIONS = {
    "learned": dict(pos_embed="learned", global_pool="map", class_token=True),
    "factorized": dict(pos_embed="factorized", global_pool="avg", use_key_only_attn_mask=True),
    "factorized_sampled": dict(pos_embed="factorized", pos_embed_use_grid_sample=True, global_pool="max"),
    "rope": dict(pos_embed="none", rope_type="axial", global_pool="token", class_token=True),
    "rope_dinov3": dict(pos_embed="learned", rope_type="dinov3", global_pool="avgmax", pre_norm=True),
    "rope_mixed": dict(pos_embed="none", rope_type="mixed", reg_tokens=2, pool_include_prefix=True, global_pool="avg"),
}


@pytest.fixture(params=POSITIONS)
def padded_row(request, monkeypatch):
    """The name of a row for padded batches, which timm itself does not compile in one graph."""
    arguments = POSITIONS[request.param]
    num_prefix_tokens = arguments.get("class_token", 0) + arguments.get("reg_tokens", 0)
    row = TIMM["naflex_padded"]
    build = row.build.func
    options = {key: value for key, value in row.build.keywords.items() if key in (*SMALL, "pos_embed_grid_size")}
    family = type(row)(lambda: build(**options, **arguments), num_prefix_tokens, **PADDED,
                       checkpoint=lambda model: model.set_grad_checkpointing())
    monkeypatch.setitem(FAMILIES, "padded", family)
    return "padded"


@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 0.8])
def test_padded_batches_equal_the_masked_full_model(padded_row, keep_rate):
    model = build_model(padded_row).eval()
    sampled = copy.deepcopy(model)
    sampler = apply_patch_sampling(sampled, eval_keep_rate=keep_rate)
    logits = sampled(padded_images())
    expected = masked_logits(padded_row, model, padded_images(), sampler.keep_indices)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, model(padded_images()), atol=1e-3)


@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 0.8])
def test_an_image_gets_the_same_logits_with_and_without_padding(padded_row, keep_rate):
    model = build_model(padded_row).eval()
    sampler = apply_patch_sampling(model, eval_keep_rate=keep_rate)
    num_prefix_tokens = FAMILIES[padded_row].num_prefix_tokens
    k = num_keep(keep_rate, 64, num_prefix_tokens)  # k counts the padded length
    logits, batch = model(padded_images()), padded_images()
    for i, num_patches in enumerate(NUM_PATCHES):
        kept = min(k, num_patches) + num_prefix_tokens
        with sampler.evaluating_at(kept / (num_patches + num_prefix_tokens)):
            alone = model({key: value[i : i + 1, :num_patches] for key, value in batch.items()})
        assert sampler.num_tokens == kept
        torch.testing.assert_close(alone[0], logits[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_gradients_and_checkpointing_of_padded_batches(padded_row, is_training):
    gradients = []
    for is_checkpointed in (False, True):
        model = build_model(padded_row).train(is_training)
        apply_patch_sampling(model, keep_rate=0.4, eval_keep_rate=0.4)
        model.set_grad_checkpointing(is_checkpointed)
        losses = [model(padded_images(seed)).square().sum() for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["magnitude", "l2_magnitude", "random"])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_is_kept_only_where_patches_run_out(sampler, is_training, dtype):
    model = build_model("naflex_padded").train(is_training)
    batch = padded_images()
    batch["patch_valid"] = batch["patch_valid"].to(dtype)
    for keep_rate in (0.1, 0.3, 0.6, 0.9):
        patch_sampler = apply_patch_sampling(model, sampler=sampler, keep_rate=keep_rate, eval_keep_rate=keep_rate)
        model(batch)
        num_kept = batch["patch_valid"].gather(1, patch_sampler.keep_indices).sum(dim=1).tolist()
        k = num_keep(keep_rate, 64, 1)
        assert num_kept == [min(k, num_patches) for num_patches in NUM_PATCHES]


def test_a_sampler_that_knows_no_padding_is_refused_for_padded_batches():
    def first(tokens, k):
        return torch.arange(k).expand(len(tokens), -1)

    model = build_model("naflex_padded").eval()
    apply_patch_sampling(model, sampler=first, eval_keep_rate=0.5)
    with pytest.raises(InputError, match=r"^sampler must take is_patch \(B, N\) .* got .*first$"):
        model(padded_images())
    model(random_images())

    def first_or_valid(tokens, k, is_patch=None):
        return first(tokens, k) if is_patch is None else is_patch.long().topk(k).indices

    sampler = apply_patch_sampling(model, sampler=first_or_valid, eval_keep_rate=0.2)
    model(padded_images())
    assert padded_images()["patch_valid"].gather(1, sampler.keep_indices).sum(dim=1).tolist() == [12, 12, 12]


@pytest.mark.parametrize("shape", [(3, 1, 65, 65), (3, 4, 65, 65), (1, 1, 1, 65), (65, 65)])
def test_a_callers_attention_mask_follows_the_kept_tokens(shape):
    model = build_model("naflex_padded").eval()
    sampled = copy.deepcopy(model)
    sampler = apply_patch_sampling(sampled, eval_keep_rate=0.5)
    batch = padded_images() | {"attn_mask": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    logits = sampled(batch)
    assert not torch.allclose(logits, sampled(padded_images()), atol=1e-3)
    expected = masked_logits("naflex_padded", model, batch, sampler.keep_indices)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


WITH_BIAS = [name for name in TIMM if name.startswith(("relpos", "beit"))]


@pytest.mark.parametrize("name", WITH_BIAS)
@pytest.mark.parametrize("keep_rate", [0.4, 1.0])
def test_unfused_attention_equals_fused_attention(name, keep_rate):
    """With two passes before the first backward pass, under checkpointing."""
    results = []
    for is_fused in (True, False):
        model = build_model(name).eval()
        apply_patch_sampling(model, eval_keep_rate=keep_rate)
        for block in model.blocks:
            block.attn.fused_attn = is_fused
        model.set_grad_checkpointing(not is_fused)
        losses = [model(random_images(seed=seed)).square().sum() for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        results.append([*losses, *(p.grad for p in model.parameters())])
    for fused, unfused in zip(*results, strict=True):
        torch.testing.assert_close(unfused, fused, atol=1e-4, rtol=1e-4)


RESIZED = [name for name in TIMM if hasattr(TIMM[name].build.func, "set_input_size")]


@pytest.mark.parametrize("name", RESIZED)
def test_input_size_changes_with_the_sampler_in_place(name):
    expected, model = (build_model(name).eval() for _ in range(2))
    sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
    for each in (expected, model):
        each.set_input_size(img_size=(48, 32))
    images = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(
        model(images), masked_logits(name, expected, images, sampler.keep_indices), atol=1e-5, rtol=1e-5
    )


def test_every_class_that_can_change_its_input_size_is_there():
    names = {TIMM[name].build.func.__name__ for name in RESIZED}
    assert names == {"VisionTransformer", "VisionTransformerDistilled", "Eva", "Beit", "VisionTransformerRelPos"}


WITH_FEATURES = ["vit", "eva02", "rope_mixed", "beit", "relpos", "relpos_shared", "naflex", "naflex_rope_mixed", "cait"]


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_feature_maps_need_every_token(name):
    untouched, model = (build_model(name).eval() for _ in range(2))
    sampler = apply_patch_sampling(model)
    images = random_images()
    for plain, sampled in zip(untouched.forward_intermediates(images, intermediates_only=True),
                              model.forward_intermediates(images, intermediates_only=True), strict=True):
        assert plain.shape == (3, 32, 8, 8)
        assert torch.equal(plain, sampled)
    for is_training, key in ((True, "keep_rate"), (False, "eval_keep_rate")):
        model.train(is_training)
        sampler.keep_rate, sampler.eval_keep_rate = (0.5, 1.0) if is_training else (1.0, 0.5)
        with pytest.raises(InputError, match=rf"^{key} must be 1 .*forward_intermediates.* grid.* got 0\.5"):
            model.forward_intermediates(images)
    if hasattr(model, "get_intermediate_layers"):
        with pytest.raises(InputError, match=r"^eval_keep_rate must be 1"):
            model.get_intermediate_layers(images, n=1, reshape=True)


@pytest.mark.parametrize("name", WITH_FEATURES)
def test_intermediates_without_a_grid_are_the_kept_tokens(name):
    model = build_model(name).eval()
    sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
    images = random_images()
    last, intermediates = model.forward_intermediates(images, output_fmt="NLC", norm=True)
    num_kept = sampler.keep_indices.shape[1]
    assert [each.shape for each in intermediates] == [(3, num_kept, 32)] * 2
    torch.testing.assert_close(last, model.forward_features(images), atol=1e-5, rtol=1e-5)
    if name != "cait":  # its final norm also sees the class token, which comes in behind the blocks
        torch.testing.assert_close(intermediates[-1], last[:, -num_kept:], atol=1e-5, rtol=1e-5)


def test_features_only_models_say_why_they_need_a_keep_rate_of_one():
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, depth=2, out_indices=(0, 1)).eval()
    images = torch.randn(2, 3, 224, 224)
    expected = model(images)
    sampler = apply_patch_sampling(model)
    assert all(torch.equal(a, b) for a, b in zip(model(images), expected, strict=True))
    sampler.eval_keep_rate = 0.5
    with pytest.raises(InputError, match=r"^eval_keep_rate must be 1 .* got 0\.5"):
        model(images)


@pytest.mark.parametrize("model_class", [Eva, NaFlexVit])
def test_a_model_that_drops_patches_itself_is_refused(model_class):
    with pytest.raises(InputError, match=r"^patch_drop_rate must be 0 under patch sampling, got 0\.5$"):
        apply_patch_sampling(model_class(**SMALL, patch_drop_rate=0.5))


def test_a_beit_with_both_kinds_of_bias_is_refused_and_left_alone():
    model = Beit(**SMALL, use_rel_pos_bias=True, use_shared_rel_pos_bias=True)
    before = repr(model)
    with pytest.raises(TypeError, match="a Beit with both shared and own relative position biases"):
        apply_patch_sampling(model)
    assert repr(model) == before
