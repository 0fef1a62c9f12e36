"""The models that every surgery test runs on: name -> builder and number of prefix tokens."""

from typing import NamedTuple

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SMALL = dict(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)


class Model(NamedTuple):
    build: callable
    num_prefix_tokens: int


MODELS = {
    "vit": Model(lambda: VisionTransformer(**SMALL), 1),
    "vit_avg": Model(lambda: VisionTransformer(**SMALL, global_pool="avg"), 1),
    "vit_no_class_token": Model(lambda: VisionTransformer(**SMALL, global_pool="avg", class_token=False), 0),
    "vit_no_position": Model(lambda: VisionTransformer(**SMALL, pos_embed="none"), 1),
    "siglip": Model(lambda: VisionTransformer(**SMALL, global_pool="map", class_token=False), 0),
    "clip": Model(lambda: VisionTransformer(**SMALL, pre_norm=True), 1),
    "registers": Model(lambda: VisionTransformer(**SMALL, reg_tokens=4, no_embed_class=True), 5),
    "deit3": Model(lambda: VisionTransformer(**SMALL, no_embed_class=True, init_values=1e-1), 1),
    "deit_distilled": Model(lambda: VisionTransformerDistilled(**SMALL), 2),
    "beit": Model(lambda: Beit(**SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1), 1),
    "beit_absolute": Model(lambda: Beit(**SMALL, use_rel_pos_bias=True, global_pool="token"), 1),
    "beit_shared": Model(lambda: Beit(**SMALL, use_shared_rel_pos_bias=True, use_abs_pos_emb=False), 1),
    "beit_no_bias": Model(lambda: Beit(**SMALL, pos_drop_rate=0.1), 1),
}
BEIT_WITH_BIAS = ["beit", "beit_absolute", "beit_shared"]


def build_model(name: str, seed: int = 0) -> nn.Module:
    """A model with every weight random, also those that start at zero (biases, bias tables) or nearly so (head)."""
    torch.manual_seed(seed)
    model = MODELS[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1).add_(0.0 if parameter.ndim > 1 else 0.3)
    return model


def random_images(batch_size: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
