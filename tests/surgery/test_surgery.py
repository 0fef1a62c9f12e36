"""`apply_patch_sampling` itself: keep rates, where it finds a ViT, a registered adapter."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
from support.families.open_clip import SMALL as SMALL_OPEN_CLIP
from support.models import SMALL, build_model, random_images
from support.oracle import masked_logits
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pss_composer import apply_patch_sampling, register_adapter, remove_patch_sampling
from pss_composer.surgery import adapters
from pss_composer.surgery.edits import put, sample_output
from pss_composer.surgery.timm import fit_vision_transformer


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


def test_in_a_model_of_images_and_texts_the_text_tower_stays():
    model, untouched = build_model("open_clip_clip").eval(), build_model("open_clip_clip").eval()
    sampler = apply_patch_sampling(model, eval_keep_rate=0.4)
    assert model.visual.patch_dropout is sampler
    words = torch.tensor([[1, 3, 2, 10, 0]])
    assert torch.equal(model.encode_text(words), untouched.encode_text(words))
    assert not torch.allclose(model.encode_image(random_images()), untouched.encode_image(random_images()))


@pytest.mark.parametrize("name", ["vit", "torchvision"])
def test_a_compiled_model_can_be_given_a_sampler_and_lose_it(name):
    model, expected = build_model(name).eval(), build_model(name).eval()
    full = expected(random_images())
    apply_patch_sampling(expected, eval_keep_rate=0.4)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change, logits in ((lambda: None, full), (lambda: apply_patch_sampling(compiled, eval_keep_rate=0.4),
                                                  expected(random_images())),
                           (lambda: remove_patch_sampling(compiled), full)):
        change()
        torch.testing.assert_close(compiled(random_images()), logits, atol=1e-5, rtol=1e-5)


def test_forward_intermediates_of_open_clip_needs_the_whole_grid():
    model, untouched = build_model("open_clip").eval(), build_model("open_clip").eval()
    sampler = apply_patch_sampling(model)
    for options in ({}, dict(output_fmt="NLC"), dict(indices=[0], output_extra_tokens=True)):
        features, expected = (each.forward_intermediates(random_images(), **options) for each in (model, untouched))
        assert features.keys() == expected.keys()
        assert torch.equal(features["image_features"], expected["image_features"])
        assert all(map(torch.equal, features["image_intermediates"], expected["image_intermediates"]))
    # half of the tokens of 32 channels would fit as all tokens of 16
    for keep_rate, train in ((0.5, False), (0.3, True)):
        sampler.keep_rate, sampler.eval_keep_rate = 0.3, 0.5
        key = "keep_rate" if train else "eval_keep_rate"
        with pytest.raises(ValueError, match=f"^{key} must be 1 here, since .* onto their grid.* got {keep_rate}"):
            model.train(train).forward_intermediates(random_images())
    (tokens, _) = model.eval().forward_intermediates(random_images(), output_fmt="NLC")["image_intermediates"]
    assert tokens.shape == (3, 31, 32)  # of 65 half, without the class token


def test_a_librarys_own_patch_dropout_is_not_thrown_away():
    model = timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="^patch_drop_rate must be 0 under patch sampling, got 0.5"):
        apply_patch_sampling(model)
    model = open_clip.transformer.VisionTransformer(**SMALL_OPEN_CLIP, patch_dropout=0.3)
    with pytest.raises(ValueError, match="^patch_dropout must be 0 under patch sampling, got 0.3"):
        apply_patch_sampling(model)


# --- adapters of one's own -----------------------------------------------------------------------------------------


class PooledViT(nn.Module):
    """A ViT of one's own, without prefix tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2))
        self.position = nn.Parameter(torch.randn(1, 64, 32))
        self.dropout = nn.Dropout(0.1)
        self.body = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, images):
        return self.body(self.dropout(self.embed(images).mT + self.position)).mean(dim=1)


class ChangedViT(PooledViT):
    def forward(self, images):
        return super().forward(images) * 2


class NamedViT(PooledViT):
    """A subclass that changes nothing that matters here."""


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(adapters, "_registered", {})


def fit_by_slot(vit, sampler):
    put(sampler, vit, "dropout", nn.Sequential(vit.dropout, sampler))


def fit_by_output(vit, sampler):
    sample_output(sampler, vit.dropout)


@pytest.mark.parametrize("fit", [fit_by_slot, fit_by_output])
@pytest.mark.parametrize("count", [0, lambda vit: 0])
@pytest.mark.parametrize("vit_class", [PooledViT, NamedViT])
def test_a_vit_of_ones_own_loses_tokens(fit, count, vit_class, registered):
    register_adapter(PooledViT, fit, num_prefix_tokens=count)
    model = vit_class().eval()
    images = random_images()
    full, keys = model(images), list(model.state_dict())
    sampler = apply_patch_sampling(nn.Sequential(model), eval_keep_rate=0.5)
    tokens = model.embed(images).mT + model.position
    kept = tokens.abs().sum(dim=-1).topk(32).indices
    expected = model.body(tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, 32))).mean(dim=1)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(each(images), expected, atol=1e-5, rtol=1e-5)
    assert sampler.keep_indices.shape == (3, 32) and list(model.state_dict()) == keys
    remove_patch_sampling(model)
    assert torch.equal(model(images), full) and str(model) == str(vit_class().eval())


def test_a_subclass_can_be_registered_with_the_adapter_of_its_base(registered):
    class Mine(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x)

    register_adapter(Mine, fit_vision_transformer, num_prefix_tokens=lambda vit: vit.num_prefix_tokens)
    model = Mine(**SMALL, reg_tokens=2)
    assert apply_patch_sampling(model) is model.patch_drop and model.patch_drop.num_prefix_tokens == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PooledViT(), fit_by_slot, 0), "^vit_class must be a subclass of torch.nn.Module, got PooledViT"),
        ((int, fit_by_slot, 0), "^vit_class must be a subclass of torch.nn.Module, got <class 'int'>"),
        ((PooledViT, "dropout", 0), "^fit must be a function of a ViT and a PatchSampler, got 'dropout'"),
        ((PooledViT, fit_by_slot, -1), "^num_prefix_tokens must be a whole number of at least 0 or .*, got -1"),
        ((PooledViT, fit_by_slot, 1.0), "^num_prefix_tokens must be a whole number of at least 0 or .*, got 1.0"),
    ],
)
def test_arguments_of_register_adapter_are_checked(arguments, message, registered):
    vit_class, fit, count = arguments
    with pytest.raises((TypeError, ValueError), match=message):
        register_adapter(vit_class, fit, num_prefix_tokens=count)


def test_a_module_whose_forward_was_replaced_is_refused(registered):
    """As accelerate's hooks do: the sampler would silently get no tokens."""
    register_adapter(PooledViT, fit_by_output, num_prefix_tokens=0)
    model = PooledViT()
    model.dropout.forward = model.dropout.forward
    with pytest.raises(TypeError, match="^cannot drop patch tokens in Dropout: this object's forward was replaced"):
        apply_patch_sampling(model)
    del model.dropout.forward
    assert isinstance(apply_patch_sampling(model), nn.Module)


def fit_without_edits(vit, sampler):
    vit.dropout = sampler


def fit_without_sampler(vit, sampler):
    put(sampler, vit, "dropout", nn.Identity())


def fit_nothing(vit, sampler):
    pass


@pytest.mark.parametrize("fit", [fit_nothing, fit_without_edits, fit_without_sampler])
def test_a_fit_that_does_not_put_the_sampler_in_is_an_error(fit, registered):
    register_adapter(PooledViT, fit, num_prefix_tokens=0)
    with pytest.raises(TypeError, match="fit must put the sampler into PooledViT with a function of pss_composer.surg"):
        apply_patch_sampling(PooledViT())
