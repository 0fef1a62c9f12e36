"""Image classifiers of Hugging Face transformers, 4.57 and 5, from the hub or from a folder."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from pss_composer.errors import InputError, to_line
from pss_composer.models.library import (
    IndexedClassifier,
    check_hub,
    find_nearest,
    read_patch_size,
    reporting_download,
    reporting_misfits,
    to_normalization,
)
from pss_composer.models.settings import CONFIG_FILE, ModelSettings
from pss_composer.models.weight_names import count_names

WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
HEAD = ("classifier.", "cls_classifier.", "distillation_classifier.")


class TransformersClassifier(IndexedClassifier):
    """A `...ForImageClassification` of transformers, or a vision model with a linear head on its pooled output.

    Args:
        module: The model.
        num_classes: Classes of its head.
        image_size: Height and width of the images, in pixels.
    """

    def __init__(self, module: Any, num_classes: int, image_size: int) -> None:
        super().__init__(module, num_classes)
        is_interpolated = getattr(_find_vision(module.config), "image_size", image_size) != image_size
        parameters = inspect.signature(getattr(module, "body_class", type(module)).forward).parameters
        can_interpolate = "interpolate_pos_encoding" in parameters
        # the library interpolates positions in every forward pass; the weights stay those of its own image size
        self.options = {"interpolate_pos_encoding": True} if is_interpolated and can_interpolate else {}
        self.takes_patches = "spatial_shapes" in parameters  # SigLIP 2

    def is_head(self, name: str) -> bool:
        return is_head(name)

    def forward(self, batch: Any) -> Tensor:
        images, _ = batch
        inputs = _cut_patches(images, self.patch_size) if self.takes_patches else {"pixel_values": images}
        logits: Tensor = self.module(**inputs, **self.options).logits
        return logits

    def enable_activation_checkpointing(self) -> None:
        # the second is the name of 4.57
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(self.module, name) for name in names if hasattr(self.module, name))
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"must be false for {type(self.module).__name__}: {to_line(error)}",
                             key="activation_checkpointing") from error

    def convert_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # a file of the bare model has no name in front
        names, prefix = self.module.state_dict().keys(), f"{self.module.base_model_prefix}."
        return {f"{prefix}{name}" if name not in names and f"{prefix}{name}" in names else name: weight
                for name, weight in weights.items()}


def is_head(name: str) -> bool:
    """Whether a weight belongs to the task; so do the norms of mean pooling in BEiT and Data2Vec."""
    return name.startswith(HEAD) or ".pooler." in name


class PooledClassifier(nn.Module):
    """Mixin that makes of a vision model's `PreTrainedModel` one with a linear head on the pooled output."""

    base_model_prefix: Any
    body_class: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.body_class(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is self.classifier:  # CLIP leaves the memory of a linear layer that is not its own as it is
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor, **options: Any) -> ImageClassifierOutput:
        """From images (B, 3, H, W) to an output with logits (B, classes).

        Raises:
            InputError: The model does not pool its tokens.
        """
        body: Any = getattr(self, self.base_model_prefix)
        pooled = getattr(body(pixel_values, **options), "pooler_output", None)
        if pooled is None:
            raise InputError(f"must be a classifier or a model with a pooled output, {self.body_class.__name__} of "
                             "transformers is neither", key="name")
        return ImageClassifierOutput(logits=self.classifier(pooled))


def build(settings: ModelSettings, *, has_weights: bool) -> TransformersClassifier:
    """See `library.build_library_model`."""
    with _quiet():
        config = _read_config(settings)
        _apply_settings(config, settings)
        source = _find_source(settings) if has_weights else None
        with reporting_misfits(settings):
            model_class = _find_class(config)
            # the exported folder says of itself what it is; the one that it came from may have had another head
            config.architectures = [getattr(model_class, "body_class", model_class).__name__]
            module = model_class._from_config(config) if source is None else None
        loaded = None
        if source is not None:
            module, loaded = _load(model_class, source, config, settings)
    model = TransformersClassifier(module, settings.num_classes, settings.image_size)
    model.loaded = loaded
    model.patch_size = read_patch_size(getattr(_find_vision(config), "patch_size", None))
    if settings.pretrained and has_weights:
        model.normalization = _read_normalization(source or settings.library_name)
    return model


def _read_config(settings: ModelSettings) -> Any:
    name = settings.library_name
    # os.path answers where pathlib raises an error: a folder that cannot be read
    is_path = name.startswith((".", "/", "~")) or os.path.isdir(name)
    if is_path and not os.path.isfile(Path(name) / CONFIG_FILE):
        raise InputError(f"must be a folder with a {CONFIG_FILE} of transformers, got 'hf/{name}'", key="name")
    if not is_path:
        check_hub(f"{name}'s {CONFIG_FILE}", "name")
    try:
        # never code from the hub; without an answer to this, transformers would ask in the terminal
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of the hub's client, of JSON, of a model that this version does not know
        reason = shorten(str(error), 200, placeholder=" ...")  # some of them name every model that there is
        raise InputError(f"must be a model of transformers, got 'hf/{name}': {reason}", key="name") from error


def _apply_settings(config: Any, settings: ModelSettings) -> None:
    """Put the recipe's settings and arguments into a configuration."""
    vision = _find_vision(config)
    config.num_labels = settings.num_classes
    if not settings.pretrained and hasattr(vision, "image_size"):
        vision.image_size = settings.image_size
    for key, name in (("patch_size", "patch_size"), ("drop_path", "drop_path_rate")):
        if getattr(settings, key) is not None:
            if not hasattr(vision, name):
                raise InputError(f"must be null for {settings.name}, whose configuration has no {name}, got "
                                 f"{getattr(settings, key)}", key=key)
            setattr(vision, name, getattr(settings, key))
    for name, value in (settings.arguments or {}).items():
        owner = next((each for each in (vision, config) if hasattr(each, name)), None)
        if owner is None:
            hint = find_nearest(name, list(vision.to_dict()), prefix="model.arguments.")
            raise InputError(f"is not a setting of {settings.name}'s {type(vision).__name__}{hint}",
                             key=f"arguments.{name}")
        setattr(owner, name, value)


def _find_vision(config: Any) -> Any:
    """The configuration of the images, within one of images and text."""
    return getattr(config, "vision_config", config)


def _find_class(config: Any) -> Any:
    """The class of a classifier with this configuration.

    Raises:
        InputError: transformers has no vision model with this configuration.
    """
    classifiers: Any
    models: Any
    classifiers, models = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.MODEL_MAPPING
    if type(config) in classifiers:
        found = classifiers[type(config)]
        return found[0] if isinstance(found, tuple) else found
    is_of_images = type(config) in models and models[type(config)].main_input_name == "pixel_values"
    if not is_of_images or hasattr(config, "num_frames"):  # which a model of videos has
        raise InputError(f"must be an image model of transformers, got 'hf/{config.name_or_path}' with a "
                         f"{type(config).__name__}", key="name")
    body_class = models[type(config)]
    family = next(each for each in body_class.__mro__[1:] if each.__module__ == body_class.__module__)
    return type(f"{body_class.__name__}Classifier", (PooledClassifier, family), {
        "body_class": body_class, "config_class": type(config), "__module__": __name__,
    })


def _cut_patches(images: Tensor, patch_size: int | None) -> dict[str, Tensor]:
    """Images (B, 3, H, W) as SigLIP 2 takes them: their patches (B, N, 3 p²), none of them padding, and their grids."""
    assert patch_size is not None
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size).permute(0, 2, 3, 4, 5, 1)
    grid = torch.tensor(patches.shape[1:3], device=images.device)
    patches = patches.flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device),
        "spatial_shapes": grid.expand(len(images), 2),
    }


def _find_source(settings: ModelSettings) -> str | None:
    """Where the library itself loads weights from: the model's own place, or a folder in its format; else None."""
    if settings.pretrained is True:
        return settings.library_name
    folder = Path(settings.pretrained or "")
    # a run of this project has the configuration alone
    has_weights = any(any(folder.glob(pattern)) for pattern in WEIGHT_FILES)
    return str(folder) if settings.pretrained and has_weights else None


def _load(model_class: Any, source: str, config: Any, settings: ModelSettings) -> tuple[Any, str]:
    """A model with the weights of a folder or of the hub, and an account of them.

    Raises:
        InputError: They cannot be loaded, or lack a weight outside the head.
    """
    with reporting_download(settings):
        try:
            module, info = model_class.from_pretrained(
                source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
                trust_remote_code=False,
            )
        except ValueError as error:  # that names are those of another model is for transformers a corrupt file
            kind = transformers.PretrainedConfig.get_config_dict(source)[0].get("model_type")
            if kind in (None, config.model_type):
                raise
            raise InputError(f"must be of the model's architecture, {source} is of a {kind}, {settings.name} of a "
                             f"{config.model_type}", key="pretrained") from error
    # transformers 5 also gives the shapes
    mismatched = {entry if isinstance(entry, str) else str(entry[0]) for entry in info["mismatched_keys"]}
    initial = sorted({*info["missing_keys"], *mismatched})
    bad = next((name for name in initial if not is_head(name)), None)
    if bad is not None:
        finding = f"has another shape at {bad}" if bad in mismatched else f"has no {bad}"
        raise InputError(f"must be of the model's architecture, {source} {finding}", key="pretrained")
    lines = [f"loaded by transformers: {len(module.state_dict()) - len(initial)} weights from {source}"]
    lines += [f"{title}: {len(names)} ({count_names(names)})" for title, names in
              (("dropped", sorted(info["unexpected_keys"])), ("left at initial values", initial)) if names]
    return module, "\n".join(lines)


def _read_normalization(source: str) -> Any:
    try:
        values, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    except Exception:  # there is none
        return None
    return to_normalization(values.get("image_mean"), values.get("image_std"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings about new heads from the terminal: the account says the same."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
