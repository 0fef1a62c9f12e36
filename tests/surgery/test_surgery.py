"""`apply_patch_sampling` itself: keep rates, where it finds a ViT, what it refuses, a registered adapter."""

import pytest
import timm
import torch
from support.models import build_model, random_images
from support.oracle import masked_logits
from torch import nn

from pss_composer import apply_patch_sampling


def test_a_real_timm_checkpoint_name_loads_strictly():
    sampled = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    apply_patch_sampling(sampled, keep_rate=0.6)
    timm.create_model("deit_tiny_patch16_224", num_classes=10).load_state_dict(sampled.state_dict(), strict=True)


def test_beit_changes_its_input_size_with_the_sampler_in_place():
    expected, model = (build_model("beit").eval() for _ in range(2))
    sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
    for each in (expected, model):
        each.set_input_size(img_size=(48, 32))
    images = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(
        model(images), masked_logits("beit", expected, images, sampler.keep_indices), atol=1e-5, rtol=1e-5
    )


def test_training_and_evaluation_have_keep_rates_of_their_own():
    model = build_model("vit")
    sampler = apply_patch_sampling(model, keep_rate=0.2, eval_keep_rate=0.8)
    for train, kept in ((True, 12), (False, 51), (True, 12)):
        model.train(train)(random_images())
        assert sampler.keep_indices.shape == (3, kept)
        assert sampler.num_tokens == kept + 1
    model = build_model("vit").eval()
    assert not apply_patch_sampling(model, keep_rate=0.2).training


def test_a_model_inside_a_model_is_found():
    wrapper = nn.ModuleDict({"backbone": build_model("vit"), "teacher": nn.Linear(2, 2)})
    sampler = apply_patch_sampling(wrapper)
    assert wrapper["backbone"].patch_drop is sampler


@pytest.mark.slow
def test_compiled_model_follows_the_keep_rate():
    model = build_model("beit").eval()
    sampler = apply_patch_sampling(model)
    compiled = torch.compile(model, backend="aot_eager")
    for keep_rate in (1.0, 0.4, 0.2, 1.0):
        sampler.eval_keep_rate = keep_rate
        torch.testing.assert_close(compiled(random_images()), model(random_images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet18"), "no patch sampling slot known for ResNet .*; supported: timm Vision"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"no patch sampling slot known for Sequential \(of Linear\)"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "no patch sampling slot known for SwinTransformer"),
        (lambda: timm.create_model("samvit_base_patch16"), "no patch sampling slot known for VisionTransformerSAM"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "no patch sampling slot known for Eva"),
        (lambda: nn.ModuleDict({"a": build_model("vit"), "b": build_model("beit")}), r"2 ViTs \(a, b\): call"),
    ],
)
def test_other_models_get_a_clear_type_error(model, message):
    with pytest.raises(TypeError, match=message):
        apply_patch_sampling(model())


def test_a_subclass_that_may_skip_the_slot_is_refused():
    class Mine(timm.models.vision_transformer.VisionTransformer):
        def forward_features(self, x):
            return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))

    with pytest.raises(TypeError, match="no patch sampling slot known for Mine"):
        apply_patch_sampling(Mine(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=4))


def test_timms_own_patch_dropout_is_not_thrown_away():
    model = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="patch_drop_rate must be 0"):
        apply_patch_sampling(model)
