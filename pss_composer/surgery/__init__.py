"""Where a ViT loses its tokens: `apply_patch_sampling` puts a `PatchSampler` into a model's slot."""

from __future__ import annotations

from torch import nn

from pss_composer.sampling import PatchSampler, Sampler
from pss_composer.surgery.adapters import find_vit, register_adapter
from pss_composer.surgery.edits import undo_edits
from pss_composer.surgery.refusals import describe_value

__all__ = ["apply_patch_sampling", "find_samplers", "register_adapter", "remove_patch_sampling"]


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
        model: A plain ViT of timm, transformers, torchvision or open_clip, or of a class given to
            `register_adapter`; or any module that contains one (a `ComposerModel`, say).
        sampler: `magnitude` (the paper's), `l2_magnitude`, `random`, or a function of the patch tokens
            `(tokens (B, N, C), k) -> keep_indices (B, k)`.
        keep_rate: Share of the tokens kept in training, in (0, 1].
        eval_keep_rate: Share of the tokens kept in evaluation and prediction, in (0, 1].

    Returns:
        The sampler in the model; assign to its `keep_rate` and `eval_keep_rate` at any time.

    Raises:
        TypeError: The model contains no ViT with a known slot, or more than one.
        ValueError: A bad keep rate or sampler, or a model that drops patches itself (`patch_drop_rate` in timm,
            `patch_dropout` in open_clip).
    """
    samplers = find_samplers(model)
    if len(samplers) > 1:
        names = ", ".join(name for name, module in model.named_modules() if module in samplers)
        raise TypeError(f"{type(model).__name__} contains {len(samplers)} patch samplers ({names}): "
                        "call apply_patch_sampling on the ViT that is meant")
    if samplers:
        samplers[0].configure(sampler, keep_rate=keep_rate, eval_keep_rate=eval_keep_rate)
        return samplers[0]

    vit, adapter = find_vit(model)
    patch_sampler = PatchSampler(
        sampler,
        num_prefix_tokens=adapter.num_prefix_tokens(vit),
        keep_rate=keep_rate,
        eval_keep_rate=eval_keep_rate,
    )
    try:
        adapter.fit(vit, patch_sampler)
        if patch_sampler not in vit.modules() or not patch_sampler.edits:
            raise TypeError(f"fit must put the sampler into {type(vit).__name__} with a function of "
                            "pss_composer.surgery.edits, and did not")
    except Exception:
        undo_edits(patch_sampler)
        raise
    # a new module is in training mode, even in a model that is in evaluation mode
    patch_sampler.train(vit.training)
    return patch_sampler


def remove_patch_sampling(model: nn.Module) -> None:
    """Take the patch samplers out of a model, which is then what it was before `apply_patch_sampling`.

    Args:
        model: Any module; one without a sampler stays as it is.

    Raises:
        TypeError: The model is not a module.
    """
    for patch_sampler in find_samplers(model):
        undo_edits(patch_sampler)


def find_samplers(model: nn.Module) -> list[PatchSampler]:
    """The patch samplers in a model.

    Raises:
        TypeError: The model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {describe_value(model)}")
    return [module for module in model.modules() if isinstance(module, PatchSampler)]
