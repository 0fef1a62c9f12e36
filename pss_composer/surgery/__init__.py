"""Where a ViT loses its tokens: `apply_patch_sampling` puts a `PatchSampler` into a model's slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from pss_composer.sampling import PatchSampler, Sampler
from pss_composer.surgery import timm as timm_adapters

# model class -> function that fits a sampler into a model of this class
ADAPTERS: dict[type[nn.Module], Callable[[Any, PatchSampler], None]] = {
    **timm_adapters.ADAPTERS,
}


def apply_patch_sampling(
    model: nn.Module,
    *,
    sampler: str | Sampler = "magnitude",
    keep_rate: float = 1.0,
    eval_keep_rate: float = 1.0,
) -> PatchSampler:
    """Make a ViT keep a share of its patch tokens, in place.

    The keys of its state dict stay as they are, and at a keep rate of 1 so do its outputs, bit for bit. A
    second call changes the settings of the sampler that is there.

    Args:
        model: A timm `VisionTransformer` or `Beit`, or any module that contains one (a `ComposerModel`, say).
        sampler: `magnitude` (the paper's), `l2_magnitude`, `random`, or a function of the patch tokens
            `(tokens (B, N, C), k) -> keep_indices (B, k)`.
        keep_rate: Share of the tokens kept in training, in (0, 1].
        eval_keep_rate: Share of the tokens kept in evaluation and prediction, in (0, 1].

    Returns:
        The sampler in the model; assign to its `keep_rate` and `eval_keep_rate` at any time.

    Raises:
        TypeError: The model contains no ViT with a known slot, or more than one.
        ValueError: A bad keep rate or sampler, or a model that uses the slot for timm's `patch_drop_rate`.
    """
    samplers = [module for module in model.modules() if isinstance(module, PatchSampler)]
    if len(samplers) > 1:
        raise TypeError(f"{type(model).__name__} has {len(samplers)} patch samplers; name the model that is meant")
    if samplers:
        samplers[0].configure(sampler, keep_rate=keep_rate, eval_keep_rate=eval_keep_rate)
        return samplers[0]

    vit, adapter = _find_vit(model)
    patch_sampler = PatchSampler(
        sampler, num_prefix_tokens=cast(int, vit.num_prefix_tokens), keep_rate=keep_rate, eval_keep_rate=eval_keep_rate
    )
    adapter(vit, patch_sampler)
    # a new module is in training mode, even in a model that is in evaluation mode
    patch_sampler.train(vit.training)
    return patch_sampler


def _find_vit(model: nn.Module) -> tuple[nn.Module, Callable[[Any, PatchSampler], None]]:
    vits = [
        (module, adapter)
        for module in model.modules()
        for model_class, adapter in ADAPTERS.items()
        # a subclass with its own forward_features may skip the slot: sampling would then silently do nothing
        if isinstance(module, model_class) and _forward_features(type(module)) is _forward_features(model_class)
    ]
    supported = ", ".join(f"{cls.__module__.split('.')[0]} {cls.__name__}" for cls in ADAPTERS)
    if not vits:
        inside = ", ".join(sorted({type(child).__name__ for child in model.children()}))
        name = type(model).__name__ + (f" (of {inside})" if inside else "")
        raise TypeError(f"no patch sampling slot known for {name}; supported: {supported}")
    if len(vits) > 1:
        names = ", ".join(name or "itself" for name, module in model.named_modules() if module in dict(vits))
        raise TypeError(f"{type(model).__name__} has {len(vits)} ViTs ({names}): call apply_patch_sampling on the one "
                        "that is meant first")
    return vits[0]


def _forward_features(model_class: type[nn.Module]) -> Any:
    return getattr(model_class, "forward_features", None)
