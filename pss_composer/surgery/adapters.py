"""Which ViTs can lose tokens: an adapter for each class, found by the class's library and name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from pss_composer.sampling import PatchSampler

# library -> the module here with its ADAPTERS, by the names of classes; imported when a model of that library comes
LIBRARIES = {
    "timm": "pss_composer.surgery.timm",
    "transformers": "pss_composer.surgery.transformers",
    "torchvision": "pss_composer.surgery.torchvision",
    "open_clip": "pss_composer.surgery.open_clip",
}
SUPPORTED = "supported are the plain ViTs of timm, transformers, torchvision and open_clip (docs/families.md)"
WRAPPERS = ("torch", "composer", "torchmetrics", "lightning", "pytorch_lightning")


@dataclass(frozen=True)
class Adapter:
    """How a sampler gets into a ViT of one class.

    Args:
        fit: Puts a sampler into a ViT, with `edits.put` and `edits.extend` so that it can be taken out.
        num_prefix_tokens: The ViT's tokens before its first patch token.
    """

    fit: Callable[[Any, PatchSampler], None]
    num_prefix_tokens: Callable[[Any], int]


_registered: dict[type[nn.Module], Adapter] = {}


def register_adapter(
    vit_class: type[nn.Module],
    fit: Callable[[Any, PatchSampler], None],
    *,
    num_prefix_tokens: int | Callable[[Any], int],
) -> None:
    """Make `apply_patch_sampling` know a ViT of your own.

    Args:
        vit_class: Its class. Subclasses count, unless they have a `forward` or `forward_features` of their own.
        fit: A function of a ViT and a `PatchSampler` that puts the sampler behind the position embedding, with
            `edits.put` or `edits.extend`.
        num_prefix_tokens: Class, distillation and register tokens, which stand before the first patch token: their
            number, or a function of the ViT.

    Raises:
        TypeError: `vit_class` is not a class of modules.
    """
    if not (isinstance(vit_class, type) and issubclass(vit_class, nn.Module)):
        raise TypeError(f"vit_class must be a subclass of torch.nn.Module, got {vit_class!r}")
    count = num_prefix_tokens if callable(num_prefix_tokens) else lambda vit: num_prefix_tokens
    _registered[vit_class] = Adapter(fit, count)


def find_vit(model: nn.Module) -> tuple[nn.Module, Adapter]:
    """The one ViT in a model that has an adapter.

    Raises:
        TypeError: There is none, or more than one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")
    vits = {name: (module, adapter) for name, module in model.named_modules() if (adapter := _find_adapter(module))}
    if not vits:
        raise TypeError(_describe_refusal(model))
    if len(vits) > 1:
        names = ", ".join(name or "itself" for name in vits)
        raise TypeError(f"{type(model).__name__} has {len(vits)} ViTs ({names}): call apply_patch_sampling on the one "
                        "that is meant first")
    return next(iter(vits.values()))


def _find_adapter(module: nn.Module) -> Adapter | None:
    for vit_class in type(module).__mro__:
        adapter = _registered.get(vit_class) or _find_adapters(vit_class).get(vit_class.__name__)
        # a subclass with a forward of its own may skip the slot: sampling would then silently do nothing
        if adapter is not None and all(
            getattr(type(module), name, None) is getattr(vit_class, name, None)
            for name in ("forward", "forward_features")
        ):
            return adapter
    return None


def _find_adapters(vit_class: type) -> Mapping[str, Adapter]:
    adapters = LIBRARIES.get(_name_library(vit_class))
    return import_module(adapters).ADAPTERS if adapters else {}


def _name_library(vit_class: type) -> str:
    return vit_class.__module__.split(".")[0]


def _describe_refusal(model: nn.Module) -> str:
    """Name the class of the model inside wrappers, what is supported, and what to do."""
    classes = [type(module) for module in model.modules()]
    inside = (
        [each for each in classes if _name_library(each) in LIBRARIES]
        or [each for each in classes if _name_library(each) not in WRAPPERS]
        or classes
    )
    library = _name_library(inside[0])
    origin = f"{library}'s {inside[0].__name__}" if library in sys.modules else inside[0].__name__
    within = "" if inside[0] is type(model) else f" (in {type(model).__name__})"
    return (f"no patch sampling slot known for {origin}{within}: {SUPPORTED}; take the same model from timm if it "
            "has one there, or write an adapter (pss_composer.surgery.register_adapter)")
