"""open_clip's families: its own ViT in all its forms, a timm tower, and both within models that also read text."""

from functools import partial
from inspect import signature
from unittest.mock import patch

import torch
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CoCa, CustomTextCLIP
from open_clip.coca_model import MultimodalCfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from support.families.family import Family, random_images

SMALL = dict(image_size=32, patch_size=4, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=7)
IMAGES = CLIPVisionCfg(image_size=32, patch_size=4, width=32, layers=2, head_width=8)
TEXTS = CLIPTextCfg(context_length=5, vocab_size=11, width=32, layers=2, heads=4)
POOL = dict(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=4)
# with two pools, as for CoCa, the output must be as wide as the tokens
NARROW = dict(width=16, output_dim=16, output_tokens=True)
COCA = dict(
    embed_dim=32,
    vision_cfg=CLIPVisionCfg(**vars(IMAGES) | dict(output_tokens=True) | POOL),
    text_cfg=CLIPTextCfg(**vars(TEXTS) | dict(embed_cls=True, output_tokens=True)),
    multimodal_cfg=MultimodalCfg(context_length=5, vocab_size=11, width=32, layers=2, heads=4),
)
WORDS = torch.tensor([[1, 3, 2, 10, 0], [1, 2, 5, 7, 10], [4, 10, 0, 0, 0]])


def _tokens(visual, images):
    """What its blocks return."""
    tokens = []
    hook = visual.transformer.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    visual(images)
    hook.remove()
    return tokens[0]


def _returning(visual, tokens):
    """Within the block its blocks return these tokens."""
    return patch.object(visual.transformer, "forward", lambda *inputs, **options: tokens)


def _run(visual, images):
    """The features, and the mean of the tokens where the model returns these, too."""
    features = visual(images)
    if torch.is_tensor(features):
        return features
    return torch.cat((features[0].flatten(1), features[1].mean(dim=1)), dim=1)


def _finish(visual, tokens):
    with _returning(visual, tokens):
        return _run(visual, random_images(len(tokens)))


def _family(unused=frozenset(), **arguments):
    return Family(
        partial(VisionTransformer, **SMALL | arguments),
        1,
        tokens=_tokens,
        head=_finish,
        run=_run,
        blocks="transformer.resblocks",
        # open_clip calls its custom blocks with too many arguments
        checkpoint=None if "qk_norm" in arguments else lambda visual: visual.set_grad_checkpointing(),
        unused=unused,
    )


def _build_timm_tower():
    """A tower by name has the size of a real model; timm makes this one, of its tests, small."""
    tower = TimmModel("test_vit", embed_dim=7, pool="avg", proj="linear")
    tower.trunk.set_input_size(img_size=32, patch_size=(4, 4))
    return tower


def _match(model, inputs):
    """How well each image matches each text; for CoCa the captions' logits, too."""
    output = model(*inputs)
    if isinstance(output, dict):
        scale, images, texts = (output[key] for key in ("logit_scale", "image_features", "text_features"))
        return torch.cat((scale * images @ texts.T, output["logits"].flatten(1)), dim=1)
    images, texts, scale = output
    return scale * images @ texts.T


def _finish_match(model, tokens):
    with _returning(model.visual, tokens):
        return _match(model, (random_images(len(tokens)), WORDS))


def _pair_family(model_class, **arguments):
    return Family(
        partial(model_class, **dict(embed_dim=7, vision_cfg=IMAGES, text_cfg=TEXTS) | arguments),
        1,
        tokens=lambda model, inputs: _tokens(model.visual, inputs[0]),
        head=_finish_match,
        run=_match,
        inputs=lambda seed: (random_images(seed=seed), WORDS),
        blocks="visual.transformer.resblocks",
        checkpoint=lambda model: model.set_grad_checkpointing(),
    )


FAMILIES = {
    "open_clip": _family(),
    "open_clip_avg": _family(pool_type="avg", no_ln_pre=True, pos_embed_type="sin_cos_2d", final_ln_after_pool=True,
                             ls_init_value=0.1, unused=frozenset({"positional_embedding"})),
    "open_clip_output_tokens": _family(output_tokens=True),
    "open_clip_attention_pool": _family(**POOL, output_dim=8),
    "open_clip_parallel_pool": _family(**POOL | dict(attentional_pool="parallel"), **NARROW),
    "open_clip_cascade_pool": _family(**POOL | dict(attentional_pool="cascade"), **NARROW),
    "open_clip_timm_tower": Family(
        _build_timm_tower,
        1,
        tokens=lambda tower, images: tower.trunk.forward_features(images),
        head=lambda tower, tokens: tower.head(tower.trunk.forward_head(tokens)),
        blocks="trunk.blocks",
        checkpoint=lambda tower: tower.set_grad_checkpointing(),
    ),
    "open_clip_clip": _pair_family(CLIP),
    "open_clip_custom_text": _pair_family(CustomTextCLIP),
    "open_clip_coca": _pair_family(CoCa, **COCA),
}
if "qk_norm" in signature(VisionTransformer).parameters:  # since 3.0
    FAMILIES["open_clip_custom_blocks"] = _family(qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_fc=True)
