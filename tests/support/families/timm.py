"""timm's families."""

from functools import partial

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from support.families.family import Family

SMALL = dict(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)


def _family(model_class, num_prefix_tokens=1, *, has_bias=False, **arguments):
    return Family(
        partial(model_class, **SMALL | arguments),
        num_prefix_tokens,
        tokens=lambda model, images: model.forward_features(images),
        head=lambda model, tokens: model.forward_head(tokens),
        has_bias=has_bias,
        checkpoint=lambda model: model.set_grad_checkpointing(),
    )


FAMILIES = {
    "vit": _family(VisionTransformer),
    "vit_avg": _family(VisionTransformer, global_pool="avg"),
    "vit_no_class_token": _family(VisionTransformer, 0, global_pool="avg", class_token=False),
    "vit_no_position": _family(VisionTransformer, pos_embed="none"),
    "siglip": _family(VisionTransformer, 0, global_pool="map", class_token=False),
    "clip": _family(VisionTransformer, pre_norm=True),
    "registers": _family(VisionTransformer, 5, reg_tokens=4, no_embed_class=True),
    "deit3": _family(VisionTransformer, no_embed_class=True, init_values=1e-1),
    "deit_distilled": _family(VisionTransformerDistilled, 2),
    "beit": _family(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1, has_bias=True),
    "beit_absolute": _family(Beit, use_rel_pos_bias=True, global_pool="token", has_bias=True),
    "beit_shared": _family(Beit, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, has_bias=True),
    "beit_no_bias": _family(Beit, pos_drop_rate=0.1),
}
