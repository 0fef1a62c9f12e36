"""The families of transformers, under 4.57 and 5."""

import torch
import transformers
from torch.nn.functional import normalize

from support.families.family import Family, random_images

try:
    from composer.models import HuggingFaceModel
except ImportError:  # make test-versions also tests without Composer
    HuggingFaceModel = None

IS_4 = transformers.__version__.startswith("4.")
VISION = dict(image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              intermediate_size=64, num_labels=7)
TEXT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=7, projection_size=32)
# under torch 2.7; the towers alone compile, see tests/surgery/test_transformers.py
DUAL_BREAKS = "" if IS_4 else "transformers 5 looks into a config within a config"
IDS = torch.randint(3, 49, (2, 7), generator=torch.Generator().manual_seed(0))


def build(name, **arguments):
    """A small ViT, or a classifier with one, by the name of its class."""
    settings = getattr(transformers, f"{name.split('For')[0].removesuffix('Model')}Config")
    return getattr(transformers, name)(settings(**VISION | arguments))


def build_dual(name, **arguments):
    """A small image tower with a text tower, or with a classifier, by the name of its class."""
    prefix = name.split("For")[0].removesuffix("Model")
    settings = getattr(transformers, f"{prefix}Config")
    vision = VISION | dict(num_patches=64) if prefix == "Siglip2" else VISION
    return getattr(transformers, name)(
        settings(text_config=TEXT, vision_config=vision | arguments, num_labels=7, projection_dim=32))


def checkpoint(model):
    """Turn on activation checkpointing by its name in transformers 5, or in 4.57."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def pad_images(seed):
    """Patches of three images of 8 x 8, 6 x 7 and 4 x 5 patches, padded to 64."""
    shapes = torch.tensor([[8, 8], [6, 7], [4, 5]])
    patches = torch.randn(3, 64, 3 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(64) < shapes.prod(dim=1, keepdim=True)
    return dict(pixel_values=patches, pixel_attention_mask=mask.int(), spatial_shapes=shapes)


def embed_padded(tower, inputs):
    """The tokens of padded images, with their mask as one more channel for the head."""
    tokens = tower(*inputs.values()).last_hidden_state
    return torch.cat((tokens, inputs["pixel_attention_mask"].unsqueeze(-1)), dim=-1)


def classify_padded(model, tokens):
    tokens, mask = tokens[..., :-1], tokens[..., -1:]
    return model.classifier((tokens * mask).sum(1) / mask.sum(1))


def compare_with_text(model, tokens):
    """CLIPModel's logits of images for texts."""
    images = model.visual_projection(model.vision_model.post_layernorm(tokens[:, 0]))
    texts = model.text_projection(model.text_model(IDS).pooler_output)
    return normalize(images, dim=-1) @ normalize(texts, dim=-1).T * model.logit_scale.exp()


def classify_class_token(model, tokens):
    return model.classifier(tokens[:, 0])


def classify_mean(model, tokens):
    return model.classifier(tokens.mean(1))


def classify_both(num_prefix_tokens):
    return lambda model, tokens: model.classifier(
        torch.cat((tokens[:, 0], tokens[:, num_prefix_tokens:].mean(1)), dim=1))


def pool(model, tokens):
    """Beit's classifier."""
    return model.classifier(model.base_model.pooler(tokens))


def _family(build, head, num_prefix_tokens=1, *, blocks, tower=lambda model: model.base_model, **options):
    """A model that takes images; the head gets the tokens that leave its tower."""
    defaults = dict(
        tokens=lambda model, images: tower(model)(images).last_hidden_state,
        run=lambda model, images: model(images).logits,
        checkpoint=checkpoint,
    )
    return Family(build, num_prefix_tokens, head=head, blocks=blocks, **defaults | options)


def _vit(name, head=classify_class_token, num_prefix_tokens=1, *, blocks, unused=(), **arguments):
    """A classifier of the library."""
    return _family(lambda: build(f"{name}ForImageClassification", **arguments), head, num_prefix_tokens, blocks=blocks,
                   unused=frozenset(unused), has_bias=any("relative" in argument for argument in arguments))


def _dual(name, head, num_prefix_tokens=0, *, unused=(), **options):
    """A model with an image tower."""
    unused = [key for key, _ in build_dual(name).named_parameters() if any(part in key for part in unused)]
    return _family(lambda: build_dual(name), head, num_prefix_tokens, tower=lambda model: model.vision_model,
                   blocks="vision_model.encoder.layers", unused=frozenset(unused), **options)


LAYERS = "encoder.layer" if IS_4 else "layers"
FAMILIES = {
    "hf_vit": _vit("ViT", blocks=f"vit.{LAYERS}"),
    "hf_deit": _vit("DeiT", num_prefix_tokens=2, blocks=f"deit.{LAYERS}"),
    "hf_dinov2": _vit("Dinov2", classify_both(1), blocks="dinov2.encoder.layer",
                      unused=["dinov2.embeddings.mask_token"]),
    "hf_dinov2_registers": _vit("Dinov2WithRegisters", classify_both(5), 5,
                                blocks="dinov2_with_registers.encoder.layer",
                                unused=["dinov2_with_registers.embeddings.mask_token"]),
    "hf_dinov3": _family(
        lambda: build("DINOv3ViTModel", num_register_tokens=4, pos_embed_rescale=None),
        lambda model, tokens: tokens[:, 0], 5, tower=lambda model: model, has_bias=True,
        run=lambda model, images: model(images).pooler_output,
        blocks="layer" if IS_4 else "model.layer", unused=frozenset({"embeddings.mask_token"})),
    "hf_beit": _vit("Beit", pool, blocks=f"beit.{LAYERS}", drop_path_rate=0.0),
    "hf_beit_own_bias": _vit("Beit", pool, blocks=f"beit.{LAYERS}", drop_path_rate=0.0,
                             use_relative_position_bias=True),
    "hf_beit_shared_bias": _vit("Beit", pool, blocks=f"beit.{LAYERS}", drop_path_rate=0.0, use_mean_pooling=False,
                                use_shared_relative_position_bias=True, use_absolute_position_embeddings=True),
    "hf_data2vec": _vit("Data2VecVision", pool, blocks="data2vec_vision.encoder.layer", drop_path_rate=0.0,
                        use_relative_position_bias=True),
    "hf_msn": _vit("ViTMSN", blocks=f"vit.{LAYERS}"),
    "hf_ijepa": _vit("IJepa", classify_mean, 0, blocks=f"ijepa.{LAYERS}"),
    "hf_siglip": _dual("SiglipForImageClassification", classify_mean, unused=[".head."], breaks=DUAL_BREAKS),
    "hf_clip": _dual("CLIPForImageClassification", lambda model, tokens: model.classifier(tokens[:, 1:].mean(1)), 1,
                     unused=["post_layernorm"], breaks=DUAL_BREAKS),
    "hf_siglip2": _dual(
        "Siglip2ForImageClassification", classify_padded, inputs=pad_images, unused=[".head."],
        tokens=lambda model, inputs: embed_padded(model.vision_model, inputs),
        run=lambda model, inputs: model(**inputs).logits,
        breaks="the size of a position embedding depends on the images"),
    "hf_clip_dual": _dual(
        "CLIPModel", compare_with_text, 1,
        inputs=lambda seed: dict(pixel_values=random_images(seed=seed), input_ids=IDS),
        tokens=lambda model, inputs: model.vision_model(inputs["pixel_values"]).last_hidden_state,
        run=lambda model, inputs: model(**inputs).logits_per_image, breaks=DUAL_BREAKS),
    "hf_composer": _family(
        lambda: HuggingFaceModel(build("ViTForImageClassification")),
        lambda model, tokens: model.model.classifier(tokens[:, 0]), tower=lambda model: model.model.vit,
        run=lambda model, images: model(dict(pixel_values=images)).logits,
        blocks=f"model.vit.{LAYERS}", checkpoint=lambda model: checkpoint(model.model)),
}
if HuggingFaceModel is None:
    del FAMILIES["hf_composer"]
