"""The table of models that every test of surgery runs on."""

import torch
from torch import nn

from support.families import open_clip, timm, torchvision, transformers
from support.families.family import Family, random_images
from support.families.timm import SMALL

__all__ = ["FAMILIES", "SMALL", "Family", "build_model", "random_images"]

FAMILIES: dict[str, Family] = {**timm.FAMILIES, **torchvision.FAMILIES, **open_clip.FAMILIES,
                               **transformers.FAMILIES}


def build_model(name: str, seed: int = 0) -> nn.Module:
    """A model with every weight random, also those that start at zero (biases, bias tables) or nearly so (head)."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1).add_(0.0 if parameter.ndim > 1 else 0.3)
    return model
