"""What the table of families leaves out of transformers, under 4.57 and 5 alike."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from support.families.transformers import FAMILIES, IDS, VISION, build, build_dual, pad_images
from support.models import build_model, random_images
from support.oracle import hiding_tokens

from pss_composer import apply_patch_sampling
from pss_composer.surgery.transformers import WHOLE_GRID

TOWER = {key: value for key, value in VISION.items() if key != "num_labels"}


def build_tower(name, **arguments):
    """An image tower alone, by the name of its class."""
    prefix = name.split("Vision")[0]
    if prefix == "Siglip2":
        arguments |= dict(num_patches=64)
    return getattr(transformers, name)(getattr(transformers, f"{prefix}VisionConfig")(**TOWER | arguments))


BARE = {
    "vit": (lambda: build("ViTModel"), 1),
    "deit": (lambda: build("DeiTModel"), 2),
    "dinov2": (lambda: build("Dinov2Model"), 1),
    "dinov2_registers": (lambda: build("Dinov2WithRegistersModel"), 5),
    "dinov3_no_registers": (lambda: build("DINOv3ViTModel", num_register_tokens=0), 1),
    "beit": (lambda: build("BeitModel", use_relative_position_bias=True), 1),
    "data2vec": (lambda: build("Data2VecVisionModel", use_shared_relative_position_bias=True), 1),
    "msn": (lambda: build("ViTMSNModel"), 1),
    "ijepa": (lambda: build("IJepaModel"), 0),
    "clip": (lambda: build_tower("CLIPVisionModel"), 1),
    "clip_projection": (lambda: build_tower("CLIPVisionModelWithProjection"), 1),
    "siglip": (lambda: build_tower("SiglipVisionModel"), 0),
    "siglip2": (lambda: build_tower("Siglip2VisionModel"), 0),
}


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def compare_with_the_masked_model(model, num_prefix_tokens, **inputs):
    """The tokens that leave a model, kept by half, against those of the full model that hides the others."""
    sampled = copy.deepcopy(model)
    sampler = apply_patch_sampling(sampled, eval_keep_rate=0.5)
    tokens = sampled(**inputs).last_hidden_state
    num_tokens = model(**inputs).last_hidden_state.shape[1]
    prefix = torch.arange(num_prefix_tokens).expand(len(tokens), -1)
    positions = torch.cat((prefix, sampler.keep_indices + num_prefix_tokens), dim=1)
    assert tokens.shape[1] == positions.shape[1] == round(num_tokens / 2)
    is_hidden = torch.ones(len(tokens), num_tokens, dtype=torch.bool).scatter(1, positions, False)
    with hiding_tokens(is_hidden):
        expected = model(**inputs).last_hidden_state
    expected = expected.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BARE)
def test_a_model_without_a_head_equals_the_masked_full_model(name):
    build_model, num_prefix_tokens = BARE[name]
    inputs = pad_images(1) if name == "siglip2" else dict(pixel_values=random_images())
    compare_with_the_masked_model(randomize(build_model()), num_prefix_tokens, **inputs)


@pytest.mark.parametrize("name", ["AltCLIPVisionModel", "ChineseCLIPVisionModel", "MetaClip2VisionModel"])
def test_relatives_of_clip_with_its_weights_give_what_it_gives(name):
    clip, relative = randomize(build_tower("CLIPVisionModel")), build_tower(name, hidden_act="quick_gelu").eval()
    relative.load_state_dict(clip.state_dict())
    samplers = [apply_patch_sampling(model, eval_keep_rate=0.5) for model in (clip, relative)]
    tokens = [model(random_images()).last_hidden_state for model in (clip, relative)]
    assert torch.equal(samplers[0].keep_indices, samplers[1].keep_indices)
    torch.testing.assert_close(tokens[1], tokens[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip_projection", "siglip"])
def test_towers_alone_compile_without_a_graph_break(name):
    model = randomize(BARE[name][0]())
    apply_patch_sampling(model, eval_keep_rate=0.5)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(random_images()).last_hidden_state, model(random_images()).last_hidden_state)


# the untouched Beit's, for the three numbers that it writes into its index of relative positions
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node with no underlying reference:UserWarning")
@pytest.mark.filterwarnings("ignore:Additional . warnings suppressed about get_attr references:UserWarning")
@pytest.mark.filterwarnings("ignore:Node .*lifted_tensor.* does not reference an nn.Module:UserWarning")
# newer torch, since the sampler remembers what it kept
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects happened:UserWarning")
@pytest.mark.parametrize("name", ["hf_beit_own_bias", "hf_data2vec", "hf_dinov3"])
def test_a_model_whose_blocks_know_positions_exports_strictly(name):
    model = build_model(name).eval()
    apply_patch_sampling(model, eval_keep_rate=0.5)
    program = torch.export.export(model, (random_images(),), strict=True)
    torch.testing.assert_close(FAMILIES[name].run(program.module(), random_images()),
                               FAMILIES[name].run(model, random_images()), atol=1e-5, rtol=1e-5)
    pickle.dumps(model)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_in_a_pair_of_towers_the_text_keeps_all_its_tokens(name):
    model = randomize(build_dual(name))
    images = pad_images(1) if name == "Siglip2Model" else dict(pixel_values=random_images())
    before = model(input_ids=IDS, **images)
    text_tower = str(model.text_model)
    sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
    after = model(input_ids=IDS, **images)
    assert sampler.keep_indices is not None
    assert str(model.text_model) == text_tower
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert after.text_model_output.last_hidden_state.shape[1] == IDS.shape[1]
    assert after.vision_model_output.last_hidden_state.shape[1] == sampler.num_tokens
    assert not torch.allclose(after.image_embeds, before.image_embeds, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "hf_composer"])
def test_eager_attention_gives_what_fused_attention_gives(name):
    logits = []
    for implementation in ("sdpa", "eager"):
        model = build_model(name).eval()
        if implementation == "eager" and ("beit" in name or "data2vec" in name):
            # 4.57 chooses a class for it when the model is built
            arguments = {key: True for key in ("use_relative_position_bias", "use_shared_relative_position_bias",
                                               "use_absolute_position_embeddings", "use_mean_pooling")
                         if getattr(model.config, key)}
            arguments |= dict(use_mean_pooling=model.config.use_mean_pooling, drop_path_rate=0.0)
            state = model.state_dict()
            model = build(type(model).__name__, attn_implementation="eager", **arguments).eval()
            model.load_state_dict(state)
        else:
            model.set_attn_implementation(implementation)
        apply_patch_sampling(model, eval_keep_rate=0.5)
        logits.append(FAMILIES[name].run(model, FAMILIES[name].inputs(1)))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_hidden_states_and_attentions_are_those_of_the_kept_tokens():
    for name in ("hf_vit", "hf_beit_own_bias", "hf_dinov3", "hf_siglip2"):
        model = FAMILIES[name].build().eval()
        if "beit" in name:
            model = build("BeitForImageClassification", attn_implementation="eager", use_relative_position_bias=True)
            model.eval()
        else:
            model.set_attn_implementation("eager")
        sampler = apply_patch_sampling(model, eval_keep_rate=0.5)
        inputs = FAMILIES[name].inputs(1)
        inputs = inputs if isinstance(inputs, dict) else dict(pixel_values=inputs)
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        T = sampler.num_tokens
        assert [tuple(each.shape) for each in output.hidden_states] == [(3, T, 32)] * 3, name
        assert [tuple(each.shape) for each in output.attentions] == [(3, 4, T, T)] * 2, name


def test_padding_is_kept_only_where_an_image_has_too_few_patches():
    model = build_model("hf_siglip2").eval()
    untouched = copy.deepcopy(model)
    sampler = apply_patch_sampling(model)
    inputs = pad_images(1)
    is_patch = inputs["pixel_attention_mask"].bool()
    inputs["pixel_values"][~is_patch] = 100.0  # which magnitude would keep first
    expected = untouched(**inputs).logits
    for keep_rate, num_real in ((0.2, [13, 13, 13]), (0.6, [38, 38, 20]), (0.7, [45, 42, 20])):
        sampler.eval_keep_rate = keep_rate
        logits = model(**inputs).logits
        assert is_patch.gather(1, sampler.keep_indices).sum(dim=1).tolist() == num_real
        # an image that keeps all its patches has the logits that it had
        is_whole = torch.tensor(num_real) == is_patch.sum(dim=1)
        torch.testing.assert_close(logits[is_whole], expected[is_whole], atol=1e-5, rtol=1e-5)


def test_images_of_one_shape_need_no_mask():
    model = build_model("hf_siglip2").eval()
    apply_patch_sampling(model, eval_keep_rate=0.5)
    inputs = pad_images(1) | dict(spatial_shapes=torch.full((3, 2), 8), pixel_attention_mask=torch.ones(3, 64))
    expected = model(**inputs).logits
    torch.testing.assert_close(model(**inputs | dict(pixel_attention_mask=None)).logits, expected)


def test_siglip2_keeps_its_signature_inside_composer():
    model = build_dual("Siglip2ForImageClassification")
    apply_patch_sampling(model, keep_rate=0.5)
    names = list(inspect.signature(model.forward).parameters)
    assert names[:4] == ["pixel_values", "pixel_attention_mask", "spatial_shapes", "labels"]
    batch = pad_images(1) | dict(labels=torch.tensor([0, 1, 2]))
    output = pytest.importorskip("composer.models").HuggingFaceModel(model)(batch)
    assert output.logits.shape == (3, 7)
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", ["hf_beit_own_bias", "hf_siglip2", "hf_dinov3"])
def test_a_saved_model_loads_without_patch_sampling(name, tmp_path):
    model = build_model(name).eval()
    apply_patch_sampling(model, eval_keep_rate=0.5)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, model.config.architectures[0]).from_pretrained(tmp_path).eval()
    assert torch.equal(FAMILIES[name].run(loaded, FAMILIES[name].inputs(1)),
                       FAMILIES[name].run(build_model(name).eval(), FAMILIES[name].inputs(1)))


@pytest.mark.parametrize(
    ("name", "arguments", "inputs"),
    [
        ("ViTModel", {}, dict(interpolate_pos_encoding=True)),
        ("DINOv3ViTModel", {}, {}),
        ("BeitModel", dict(use_relative_position_bias=True), {}),
        ("BeitModel", dict(use_relative_position_bias=True), dict(interpolate_pos_encoding=True)),
        ("BeitModel", dict(use_shared_relative_position_bias=True), dict(interpolate_pos_encoding=True)),
    ],
)
def test_images_of_another_size(name, arguments, inputs):
    model = randomize(build(name, **arguments))
    prefix = 5 if "DINOv3" in name and model.config.num_register_tokens == 4 else 1
    compare_with_the_masked_model(model, prefix, pixel_values=torch.randn(2, 3, 48, 40), **inputs)


@pytest.mark.parametrize("name", ["Dinov2Model", "BeitModel"])
def test_masked_patches(name):
    model = randomize(build(name, use_mask_token=True, use_relative_position_bias=True))
    is_masked = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    compare_with_the_masked_model(model, 1, pixel_values=random_images(), bool_masked_pos=is_masked)


def build_whole_grid(name):
    arguments = dict(out_features=["stage1", "stage2"]) if "Backbone" in name else {}
    if "MaskedImage" in name:
        arguments = dict(encoder_stride=4, use_mask_token=True)
    if "Segmentation" in name:
        arguments = dict(num_hidden_layers=4, out_indices=[0, 1, 2, 3], use_auxiliary_head=False, pool_scales=[1, 2])
    config = name.split("For")[0].removesuffix("Backbone")
    return getattr(transformers, name)(getattr(transformers, f"{config}Config")(**VISION | arguments))


@pytest.mark.parametrize("name", [name for name in WHOLE_GRID if hasattr(transformers, name)])
def test_heads_that_need_the_whole_grid_say_so_below_a_keep_rate_of_one(name):
    model = randomize(build_whole_grid(name))
    expected = model(random_images())[0]
    sampler = apply_patch_sampling(model)
    output = model(random_images())[0]
    for each, other in zip(output, expected, strict=True):
        assert torch.equal(each, other)
    sampler.eval_keep_rate = 0.5
    with pytest.raises(ValueError, match=f"eval_keep_rate must be 1 here, since {name} puts all tokens onto their"):
        model(random_images())


@pytest.mark.parametrize(
    "name",
    ["Swinv2Model", "ViTMAEModel", "ViTMAEForPreTraining", "MobileViTModel", "ConvNextModel", "DPTModel",
     "VideoMAEModel", "PvtV2Model", "LevitModel"],
)
def test_models_that_mask_window_or_pool_their_tokens_are_refused(name):
    model_class = getattr(transformers, name)
    config = getattr(transformers, name.split("For")[0].removesuffix("Model") + "Config")()
    with torch.device("meta"):
        model = model_class(config)
    with pytest.raises(TypeError, match=f"cannot drop patch tokens in transformers' {name}: "):
        apply_patch_sampling(model)


def test_a_beit_with_both_kinds_of_bias_is_refused_and_stays_as_it_was():
    model = build("BeitModel", use_relative_position_bias=True, use_shared_relative_position_bias=True)
    before = repr(model)
    with pytest.raises(TypeError, match="both shared and own"):
        apply_patch_sampling(model)
    assert repr(model) == before
