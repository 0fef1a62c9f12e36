"""timm's models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor

from pss_composer.errors import InputError, to_line
from pss_composer.models.library import (
    LibraryClassifier,
    check_hub,
    find_nearest,
    read_patch_size,
    reporting_download,
    reporting_misfits,
    to_normalization,
)
from pss_composer.models.settings import ModelSettings


class TimmClassifier(LibraryClassifier):
    """A model of `timm.create_model`."""

    def is_head(self, name: str) -> bool:
        classifier = self.vit.pretrained_cfg.get("classifier") or "head"
        heads = (classifier,) if isinstance(classifier, str) else classifier
        # mean pooling has a norm of its own in the head
        return name.startswith((*(f"{head}." for head in heads), "fc_norm."))

    def enable_activation_checkpointing(self) -> None:
        try:
            super().enable_activation_checkpointing()
        except (AssertionError, AttributeError) as error:  # some CNNs assert that it is off, others do not have it
            raise InputError(f"must be false for timm's {type(self.vit).__name__}: {to_line(error)}",
                             key="activation_checkpointing") from error

    def convert_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # timm keeps this function beside each class; it interpolates positions and patches, and renames
        convert = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
        return convert(dict(weights), self.vit) if convert else weights


def build(settings: ModelSettings, *, has_weights: bool) -> TimmClassifier:
    """See `library.build_library_model`."""
    name = settings.library_name
    _check_name(name)
    cfg = timm.models.get_pretrained_cfg(name)
    arguments: dict[str, Any] = {
        "num_classes": settings.num_classes,
        "patch_size": settings.patch_size,
        "drop_path_rate": settings.drop_path,
        # models that take images of any size, CNNs among them, have no such argument
        "img_size": settings.image_size if cfg is not None and cfg.fixed_input_size else None,
        **(settings.arguments or {}),
    }
    vit: Any
    with reporting_misfits(settings):
        vit = timm.create_model(name, pretrained=False, **arguments)
    if has_weights and settings.pretrained is True:
        if cfg is not None and cfg.hf_hub_id and not cfg.file:
            check_hub(f"timm's {name}", "pretrained")
        with reporting_download(settings):
            vit = timm.create_model(name, pretrained=True, **arguments)
    model = TimmClassifier(vit, settings.num_classes)
    if settings.pretrained:
        model.normalization = to_normalization(vit.pretrained_cfg.get("mean"), vit.pretrained_cfg.get("std"))
    if has_weights and settings.pretrained is True:
        model.loaded = f"loaded by timm: {vit.pretrained_cfg['architecture']}.{vit.pretrained_cfg.get('tag', '')}"
    model.patch_size = read_patch_size(getattr(getattr(vit, "patch_embed", None), "patch_size", None))
    return model


def _check_name(name: str) -> None:
    architecture, dot, _ = name.partition(".")
    if not timm.is_model(architecture):
        hint = find_nearest(architecture, timm.list_models(), prefix="timm/")
        raise InputError(f"must be a model of timm, got 'timm/{name}'{hint}", key="name")
    tags = [each for each in timm.list_pretrained(f"{architecture}.*") if each.partition(".")[0] == architecture]
    if dot and name not in tags:
        raise InputError(f"must be a model of timm with one of its tags, got 'timm/{name}'; there are "
                         f"{', '.join(tags) or 'none'}", key="name")
