"""The settings of a recipe's model: one of this project's, or any library's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from pss_composer.checks import find_broken
from pss_composer.errors import InputError
from pss_composer.models.shape import ViTShape

MODELS = ("deit", "simmim", "simmim_pretrain")
# the first part of model.name -> the library, and those of its arguments that settings of their own stand for
LIBRARIES = {"timm": "timm", "hf": "transformers", "torchvision": "torchvision"}
OWN_SETTINGS = {
    "timm": {"num_classes": "num_classes", "img_size": "image_size", "patch_size": "patch_size",
             "drop_path_rate": "drop_path", "pretrained": "pretrained"},
    "hf": {"num_labels": "num_classes", "image_size": "image_size", "patch_size": "patch_size",
           "drop_path_rate": "drop_path"},
    "torchvision": {"num_classes": "num_classes", "image_size": "image_size", "weights": "pretrained"},
}
CONFIG_FILE = "config.json"  # what transformers knows a model by; also in the folder of a run with such a model
SHAPE = [setting.name for setting in dataclasses.fields(ViTShape)]


@dataclass
class ModelSettings:
    """A model, its sizes, and where its weights come from.

    Models of this project: `models.deit.DeiT` (`name: deit`), `models.simmim.SimMIMClassifier` (`simmim`),
    `pretraining.simmim.SimMIM` (`simmim_pretrain`); their sizes are a `ViTShape`, whose defaults stand for null.
    Models of libraries: `timm/NAME`, `hf/NAME` or `hf/FOLDER`, and `torchvision/NAME`; null is the library's own value.

    Args:
        name: The model.
        pretrained: A file or a folder with weights; true for the library's own download; false or null for none.
        size: Of a model of this project.
        image_size: Height and width of an image in pixels.
        patch_size: Height and width of a patch in pixels.
        num_classes: Classes of the head.
        drop_path: Stochastic depth rate of the last block, in [0, 1).
        embed_dim: Of a model of this project.
        depth: Of a model of this project.
        num_heads: Of a model of this project.
        is_distilled: Of `deit`.
        relative_position_bias: Of `deit`.
        arguments: More arguments of a library's model: of timm's or torchvision's class, of the configuration in
            transformers.
    """

    name: str = MISSING
    pretrained: bool | str | None = None
    size: str | None = None
    image_size: int = 224
    patch_size: int | None = None
    num_classes: int = 1000
    drop_path: float | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    is_distilled: bool = False
    relative_position_bias: bool = False
    arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.name in MODELS:
            for setting in dataclasses.fields(ViTShape):
                if getattr(self, setting.name) is None:
                    setattr(self, setting.name, setting.default)

    @property
    def shape(self) -> ViTShape:
        """The sizes of a model of this project."""
        return ViTShape(**{name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None})

    @property
    def library(self) -> str | None:
        """`timm`, `hf` or `torchvision`; None for a model of this project."""
        prefix, slash, name = self.name.partition("/")
        return prefix if slash and name and prefix in LIBRARIES else None

    @property
    def library_name(self) -> str:
        """What the library calls the model: the name without its first part."""
        return self.name.partition("/")[2]

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        return self._check_own_model() if self.library is None else self._check_library_model(self.library)

    def _check_own_model(self) -> list[InputError]:
        is_deit, rule = self.name == "deit", f"for model.name={self.name}"
        return self.shape.check() + find_broken(
            self,
            ("name", self.name in MODELS,
             f"must be one of {', '.join(MODELS)}, or {', '.join(f'{library}/NAME' for library in LIBRARIES)}"),
            ("pretrained", self.pretrained is not True, f"must be a file, a folder or null {rule}"),
            ("arguments", not self.arguments, f"must be null {rule}"),
            ("is_distilled", is_deit or not self.is_distilled, f"must be false {rule}"),
            ("is_distilled", not (self.is_distilled and self.relative_position_bias),
             "must be false with model.relative_position_bias=true"),
            ("relative_position_bias", is_deit or not self.relative_position_bias, f"must be false {rule}"),
        )

    def _check_library_model(self, library: str) -> list[InputError]:
        rule = f"for model.name={self.name}"
        is_torchvision = library == "torchvision"
        # torchvision's ViTs have no stochastic depth, and a patch size that follows from the name
        unused = ("size", "embed_dim", "depth", "num_heads", *(("patch_size", "drop_path") if is_torchvision else ()))
        hint = "" if is_torchvision else ": what the library calls it goes into model.arguments"
        errors = find_broken(
            self,
            ("name", not is_torchvision or self.library_name.startswith("vit_"),
             "must be a ViT of torchvision, like torchvision/vit_b_16"),
            *((name, getattr(self, name) is None, f"must be null {rule}{hint}") for name in unused),
            *((name, not getattr(self, name), f"must be false {rule}")
              for name in ("is_distilled", "relative_position_bias")),
            ("image_size", self.image_size >= 1, "must be at least 1"),
            ("patch_size", self.patch_size is None or self.patch_size >= 1, "must be at least 1"),
            ("num_classes", self.num_classes >= 2, "must be at least 2"),
            ("drop_path", self.drop_path is None or 0.0 <= self.drop_path < 1.0, "must be in [0, 1)"),
        )
        for argument, key in OWN_SETTINGS[library].items():
            if argument in (self.arguments or {}):
                errors.append(InputError(f"must be set as model.{key}", key=f"arguments.{argument}"))
        return errors
