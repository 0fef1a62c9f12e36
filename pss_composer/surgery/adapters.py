"""Which ViTs can lose tokens: an adapter for each class, found by the class's library and name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from pss_composer.errors import InputError
from pss_composer.sampling import PatchSampler
from pss_composer.surgery.refusals import LIBRARIES, describe_refusal, describe_subclass, name_library

# a subclass that has one of these methods anew may go past the slot: sampling would then silently do nothing
METHODS_WITH_A_SLOT = ("forward", "forward_features", "_pos_embed", "_embeds")


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
        fit: A function of a ViT and a `PatchSampler` that puts the sampler where all tokens (B, P + N, C) pass, behind
            the position embedding: with `put`, `sample_output` or `extend` of `pss_composer.surgery.edits`.
        num_prefix_tokens: P, the class, distillation and register tokens that stand before the first patch token: a
            number, or a function of the ViT.

    Raises:
        TypeError: `vit_class` is not a class of modules, or `fit` is no function.
        ValueError: `num_prefix_tokens` is neither a number of at least 0 nor a function.

    Example, for a ViT that calls `self.dropout` behind the position embedding and then its blocks::

        from pss_composer.surgery.edits import put

        def fit(vit, sampler):
            put(sampler, vit, "dropout", nn.Sequential(vit.dropout, sampler))

        register_adapter(MyViT, fit, num_prefix_tokens=1)
        apply_patch_sampling(MyViT(), keep_rate=0.6)
    """
    if not (isinstance(vit_class, type) and issubclass(vit_class, nn.Module)):
        raise TypeError(f"vit_class must be a subclass of torch.nn.Module, got {vit_class!r}")
    if not callable(fit):
        raise TypeError(f"fit must be a function of a ViT and a PatchSampler, got {fit!r}")
    if not callable(num_prefix_tokens) and not (isinstance(num_prefix_tokens, int) and num_prefix_tokens >= 0):
        raise InputError(f"must be a whole number of at least 0 or a function of the ViT, got {num_prefix_tokens!r}",
                         key="num_prefix_tokens")
    count = num_prefix_tokens if callable(num_prefix_tokens) else lambda vit: num_prefix_tokens
    _registered[vit_class] = Adapter(fit, count)


def find_vit(model: nn.Module) -> tuple[nn.Module, Adapter]:
    """The one ViT in a model that has an adapter.

    Raises:
        TypeError: There is none, or more than one.
    """
    vits: dict[str, tuple[nn.Module, Adapter]] = {}
    within: set[nn.Module] = set()
    refusal = ""
    for name, module in model.named_modules():
        # an adapter also fits what is inside its module
        if module in within or (known := _find_known(type(module))) is None:
            continue
        vit_class, adapter = known
        if method := _find_overridden(type(module), vit_class):
            refusal = describe_subclass(type(module), vit_class, method, adapter.fit)
            continue
        vits[name] = module, adapter
        within.update(module.modules())
    if not vits:
        raise TypeError(refusal or describe_refusal(model))
    if len(vits) > 1:
        raise TypeError(f"{type(model).__name__} contains {len(vits)} ViTs ({', '.join(vits)}): call "
                        "apply_patch_sampling on the one that is to lose tokens; PatchSamplingSchedule then takes it")
    return next(iter(vits.values()))


def _find_known(module_class: type) -> tuple[type, Adapter] | None:
    """The nearest of a class and its bases that has an adapter."""
    for vit_class in module_class.__mro__:
        adapter = _registered.get(vit_class) or _find_adapters(vit_class).get(vit_class.__name__)
        if adapter is not None:
            return vit_class, adapter
    return None


def _find_adapters(vit_class: type) -> Mapping[str, Adapter]:
    library = name_library(vit_class)
    # imported when a model of that library comes
    return import_module(f"pss_composer.surgery.{library}").ADAPTERS if library in LIBRARIES else {}


def _find_overridden(module_class: type, vit_class: type) -> str | None:
    """A method of a subclass that may go past the slot."""
    for name in METHODS_WITH_A_SLOT:
        if getattr(module_class, name, None) is not getattr(vit_class, name, None):
            return name
    return None
