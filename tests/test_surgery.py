"""Surgery on real models against the oracle: the full-length model with dropped tokens masked out of attention."""

import copy
import pickle

import pytest
import timm
import torch
from support.models import BEIT_WITH_BIAS, MODELS, build_model, random_images
from timm.models.beit import Beit
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from pss_composer import PatchSampler, apply_patch_sampling
from pss_composer.sampling import num_keep


class _MaskedBias(nn.Module):
    """Stands for Beit's shared bias: its own value plus a mask."""

    def __init__(self, bias, mask):
        super().__init__()
        self.bias, self.mask = bias, mask

    def forward(self):
        return self.mask if self.bias is None else self.bias() + self.mask


def masked_logits(model, images, keep_indices):
    """The untouched model's logits when no token sees the dropped ones."""
    num_prefix = model.num_prefix_tokens
    num_tokens = num_prefix + model.patch_embed.num_patches
    positions = torch.cat((torch.arange(num_prefix).expand(len(images), -1), keep_indices + num_prefix), dim=1)
    mask = torch.full((len(images), num_tokens), -torch.inf).scatter(1, positions, 0.0)
    mask = mask[:, None, None, :].expand(-1, 1, num_tokens, -1)
    if isinstance(model, Beit):
        bias = model.rel_pos_bias
        model.rel_pos_bias = _MaskedBias(bias, mask)
        features = model.forward_features(images)
        model.rel_pos_bias = bias
    else:
        features = model.forward_features(images, attn_mask=mask)
    kept = features.gather(1, positions.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    return model.forward_head(kept)


@pytest.mark.parametrize("keep_rate", [0.2, 0.6, 0.8])
@pytest.mark.parametrize("sampler", ["magnitude", "l2_magnitude", "random"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_full_model(name, sampler, keep_rate):
    model = build_model(name).eval()
    sampled = copy.deepcopy(model)
    patch_sampler = apply_patch_sampling(sampled, sampler=sampler, eval_keep_rate=keep_rate)
    images = random_images()
    logits = sampled(images)
    keep_indices = patch_sampler.keep_indices
    assert keep_indices.shape == (3, num_keep(keep_rate, 64, MODELS[name].num_prefix_tokens))
    torch.testing.assert_close(logits, masked_logits(model, images, keep_indices), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, model(images), atol=1e-3), "dropping tokens must change the logits"


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_the_masked_full_model(name):
    model = build_model(name)
    sampled = copy.deepcopy(model)
    patch_sampler = apply_patch_sampling(sampled, keep_rate=0.5)
    if name == "beit_no_bias":  # its dropout draws other numbers for the oracle
        model.pos_drop.p = sampled.pos_drop[0].p = 0.0
    images = random_images()
    sampled(images).square().sum().backward()
    masked_logits(model, images, patch_sampler.keep_indices).square().sum().backward()
    expected = dict(model.named_parameters())
    for parameter_name, parameter in sampled.named_parameters():
        gradient = expected[parameter_name].grad
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, atol=1e-5, rtol=1e-4, msg=parameter_name)


@pytest.mark.parametrize("name", MODELS)
def test_at_keep_rate_one_outputs_and_gradients_are_bitwise_those_of_the_untouched_model(name):
    model = build_model(name)
    sampled = copy.deepcopy(model)
    apply_patch_sampling(sampled, keep_rate=1.0)
    images = random_images()
    outputs = []
    for each in (model, sampled):
        torch.manual_seed(0)
        logits = each(images)
        logits.square().sum().backward()
        outputs.append((logits, [parameter.grad for parameter in each.parameters()]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][1], outputs[1][1], strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_load_with_and_without(name):
    plain, sampled = build_model(name, seed=0), build_model(name, seed=1)
    apply_patch_sampling(sampled, eval_keep_rate=1.0)
    assert list(sampled.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(sampled.state_dict(), strict=True)
    images = random_images()
    assert torch.equal(plain.eval()(images), sampled.eval()(images))
    sampled.load_state_dict(build_model(name, seed=2).state_dict(), strict=True)


def test_a_real_timm_checkpoint_name_loads_strictly():
    sampled = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    apply_patch_sampling(sampled, keep_rate=0.6)
    timm.create_model("deit_tiny_patch16_224", num_classes=10).load_state_dict(sampled.state_dict(), strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_applied_twice_equals_once(name):
    model = build_model(name).eval()
    once = apply_patch_sampling(model, eval_keep_rate=0.6)
    logits = model(random_images())
    twice = apply_patch_sampling(model, eval_keep_rate=0.6)
    assert twice is once
    assert torch.equal(model(random_images()), logits)
    apply_patch_sampling(model, sampler="l2_magnitude", keep_rate=0.3, eval_keep_rate=0.4)
    assert (once.sampler, once.keep_rate, once.eval_keep_rate) == ("l2_magnitude", 0.3, 0.4)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_stand_alone(name):
    model = build_model(name).eval()
    apply_patch_sampling(model, eval_keep_rate=0.5)
    logits = model(random_images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(random_images()), logits)
        (sampler,) = {module for module in twin.modules() if isinstance(module, PatchSampler)}
        sampler.eval_keep_rate = 0.2
        assert not torch.equal(twin(random_images()), logits)
        assert torch.equal(model(random_images()), logits)


@pytest.mark.parametrize("name", BEIT_WITH_BIAS)
@pytest.mark.parametrize("way", ["composer", "timm"])
def test_bias_is_right_when_checkpointing_recomputes_after_another_forward(name, way):
    """Two passes with other tokens before the first backward: recomputing must see the tokens of its own pass."""
    gradients = []
    for is_checkpointed in (False, True):
        model = build_model(name)
        apply_patch_sampling(model, keep_rate=0.4)
        if is_checkpointed and way == "timm":
            model.set_grad_checkpointing()
        elif is_checkpointed:
            for index, block in enumerate(model.blocks):
                model.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        losses = [model(random_images(seed=seed)).square().sum() for seed in (1, 2, 3)]
        for loss in losses:
            loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5)


def test_beit_changes_its_input_size_with_the_sampler_in_place():
    expected, model = (build_model("beit").eval() for _ in range(2))
    sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
    for each in (expected, model):
        each.set_input_size(img_size=(48, 32))
    images = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(
        model(images), masked_logits(expected, images, sampler.keep_indices), atol=1e-5, rtol=1e-5
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
