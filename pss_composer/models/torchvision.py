"""torchvision's ViTs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from pss_composer.errors import InputError
from pss_composer.models.library import (
    IndexedClassifier,
    check_image_size,
    find_nearest,
    reporting_download,
    reporting_misfits,
    to_normalization,
)
from pss_composer.models.settings import ModelSettings


class TorchvisionClassifier(IndexedClassifier):
    """A `VisionTransformer` of torchvision."""

    HEAD = ("heads.",)

    def convert_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return interpolate_embeddings(self.vit.image_size, self.vit.patch_size, dict(weights))

    def enable_activation_checkpointing(self) -> None:
        """Wrap the blocks as torch does it for FSDP: torchvision has nothing of its own."""
        apply_activation_checkpointing(
            self.vit,
            lambda block: checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
            self.vit.activation_checkpointing_fn,
        )


def build(settings: ModelSettings, *, has_weights: bool) -> TorchvisionClassifier:
    """See `library.build_library_model`."""
    name = settings.library_name
    known = [each for each in torchvision.models.list_models() if each.startswith("vit_")]
    if name not in known:
        hint = find_nearest(name, known, prefix="torchvision/")
        raise InputError(f"must be a ViT of torchvision, got 'torchvision/{name}'{hint}", key="name")
    with reporting_misfits(settings):
        with torch.device("meta"):
            named = torchvision.models.get_model(name)
        arguments: dict[str, Any] = {
            # what goes with the name; torchvision's function does not let any of it be replaced
            "patch_size": named.patch_size, "hidden_dim": named.hidden_dim, "mlp_dim": named.mlp_dim,
            "num_layers": len(named.encoder.layers), "num_heads": named.encoder.layers[0].num_heads,
            "num_classes": settings.num_classes, "image_size": settings.image_size, **(settings.arguments or {}),
        }
        check_image_size(settings, arguments["patch_size"])  # torchvision would assert it
        vit = VisionTransformer(**arguments)
    model = TorchvisionClassifier(vit, settings.num_classes)
    model.patch_size = vit.patch_size
    if settings.pretrained:
        with reporting_download(settings):
            weights = torchvision.models.get_model_weights(name).DEFAULT
        transforms = weights.transforms()
        model.normalization = to_normalization(transforms.mean, transforms.std)
        if has_weights and settings.pretrained is True:
            with reporting_download(settings):
                try:
                    state_dict = weights.get_state_dict(progress=False, check_hash=True)
                except URLError as error:
                    raise InputError(f"needs {weights.url}, which cannot be reached ({error.reason}): give a file",
                                     key="pretrained") from error
                _load(model, state_dict)
            model.loaded = f"loaded by torchvision: {weights}"
    return model


def _load(model: TorchvisionClassifier, weights: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Any] = {
        name: tensor for name, tensor in model.convert_weights(weights).items() if not model.is_head(name)
    }
    missing = [name for name in model.vit.load_state_dict(tensors, strict=False).missing_keys
               if not model.is_head(name)]
    if missing:
        raise ValueError(f"no {missing[0]}")
