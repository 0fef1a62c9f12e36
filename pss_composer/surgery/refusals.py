"""What `apply_patch_sampling` says about a model that cannot lose tokens, or that it does not know."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

LIBRARIES = ("timm", "transformers", "torchvision", "open_clip")
WRAPPERS = ("composer", "torchmetrics", "lightning", "pytorch_lightning")
SUPPORTED = ("Patch sampling works with the plain ViTs of timm, transformers, torchvision and open_clip: ViT, DeiT, "
             "DINOv2, DINOv3, CLIP, SigLIP, BEiT, EVA-02")
SEE_HELP = "help(pss_composer.register_adapter) has an example"
# models that cut the grid of tokens into windows, or merge tokens that are neighbours
WHOLE_GRID = re.compile("Swin|Hiera|SAM|Sam[A-Z0-9]|MViT|MultiScale|Pyramid|Pvt|MaxVi|Maxx|Twins|Focal|DaVi|Coa[Tt]"
                        "|Nest|GlobalContext|Levit|PoolingVi|Efficient(Vi|Form)|FastVi|MobileVi|TinyVi|Segformer")
ATTENTION = re.compile("attn|attention(?!(al)?pool)|^[a-z]*sa$", re.IGNORECASE)  # GPSA, say
IMAGE_TOWERS = ("visual", "vision_model", "trunk")


def describe_value(value: object) -> str:
    """Something that is no model, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value!r}: build the model of that name first"
    if isinstance(value, type):
        return f"the class {value.__name__}: pass an object of it"
    return f"an object of class {type(value).__name__}"


def describe_subclass(module_class: type, vit_class: type, method: str, fit: Callable[..., None]) -> str:
    """Why a subclass of a known ViT is refused, and what to do."""
    name = module_class.__name__
    return (f"cannot drop patch tokens in {name}: it is a subclass of {_name_class(vit_class)} with its own {method}, "
            "which may go past the place where tokens are dropped. If yours does not (it calls "
            f"super().{method}, say), register it: pss_composer.register_adapter({name}, "
            f"{fit.__module__}.{fit.__name__}, num_prefix_tokens=...); otherwise with a function of your own in the "
            f"second place ({SEE_HELP})")


def describe_refusal(model: nn.Module) -> str:
    """Name the class of the model inside wrappers, what is supported, and what to do."""
    inside = _find_inside(model)
    within = "" if inside is model else f" (inside {type(model).__name__})"
    name = type(inside).__name__
    is_of_library = name_library(type(inside)) in LIBRARIES
    reason, advice = "it is not a model that patch sampling knows", "take one of these"
    if is_of_library and WHOLE_GRID.search(name):
        reason = "it cuts its grid of tokens into windows or merges them, for which it needs all of them"
    elif is_of_library and not any(ATTENTION.search(type(module).__name__) for module in inside.modules()):
        reason = "it has no attention between patches"
    else:
        advice += f", perhaps the same model from timm, or write an adapter for a plain ViT ({SEE_HELP})"
    return f"cannot drop patch tokens in {_name_class(type(inside))}{within}: {reason}. {SUPPORTED}; {advice}"


def _find_inside(model: nn.Module) -> nn.Module:
    """A library's module with at least half of the weights, or the first that is no wrapper."""
    modules = [module for module in model.modules() if not _is_wrapper(type(module))] or [model]
    inside = next((module for module in modules if name_library(type(module)) in LIBRARIES
                   and 2 * _count_weights(module) >= _count_weights(model)), modules[0])
    for name in IMAGE_TOWERS:
        inside = getattr(inside, name, inside)
    return inside


def _is_wrapper(module_class: type) -> bool:
    is_derived = any(name_library(each) in WRAPPERS for each in module_class.__mro__)
    return is_derived or name_library(module_class) == "torch"


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name_class(module_class: type) -> str:
    library = name_library(module_class)
    owner = "" if library == "__main__" else f"{library}' " if library.endswith("s") else f"{library}'s "
    return owner + module_class.__name__


def name_library(module_class: type[Any]) -> str:
    """The top package of a class."""
    return module_class.__module__.split(".")[0]
