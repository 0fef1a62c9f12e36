"""torchvision's families."""

from functools import partial

import torch
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from support.families.family import Family

SMALL = dict(image_size=32, patch_size=4, num_classes=7, hidden_dim=32, mlp_dim=64, num_layers=2, num_heads=4)


def _tokens(model, images):
    patches = model._process_input(images)
    return model.encoder(torch.cat((model.class_token.expand(len(images), -1, -1), patches), dim=1))


def _family(**arguments):
    return Family(
        partial(VisionTransformer, **SMALL | arguments),
        1,
        tokens=_tokens,
        head=lambda model, tokens: model.heads(tokens[:, 0]),
        blocks="encoder.layers",
    )


FAMILIES = {
    "torchvision": _family(),
    "torchvision_conv_stem": _family(
        conv_stem_configs=[ConvStemConfig(out_channels=8, kernel_size=4, stride=4)],
        representation_size=16, dropout=0.1,
    ),
}
