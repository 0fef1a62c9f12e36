"""What is checked of a sampler of one's own: the arguments that it takes, and the indices that it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pss_composer.errors import InputError


class SamplerChecks:
    """Runs a sampler of one's own, and checks what it returns.

    Type, shape and device are checked in every pass; the values in the first pass with each k, so that a training step
    waits for them on a GPU in these few alone. Nothing reads the values while torch compiles, exports or traces.

    Args:
        sampler: A function `(tokens, k) -> keep_indices`, which for padded images takes `is_patch`, too.
    """

    def __init__(self, sampler: Callable[..., Tensor]) -> None:
        self.takes_is_patch = accepts(sampler, is_patch=None)
        self.checked: set[int] = set()  # the k whose first indices have been read

    def run(
        self, sampler: Callable[..., Tensor], tokens: Tensor, k: int, is_patch: Tensor | None = None
    ) -> Tensor:
        """The indices (B, k) that the sampler returns for tokens (B, N, C).

        Raises:
            InputError: It returned something else, or takes no `is_patch` for padded images.
        """
        if is_patch is None:
            keep_indices = sampler(tokens, k)
        elif self.takes_is_patch:
            keep_indices = sampler(tokens, k, is_patch=is_patch)
        else:
            raise InputError("must take is_patch (B, N) for images with padding, as in (tokens, k, is_patch=None), "
                             f"got {describe(sampler)}", key="sampler")
        fault = _find_fault_of_form(keep_indices, tokens, k)
        if fault is None and _has_values(keep_indices) and k not in self.checked:
            fault = _find_fault_of_values(keep_indices, tokens.shape[1], is_patch)
            self.checked.add(k)
        if fault is not None:
            raise InputError(f"must return {fault} from {describe(sampler)}", key="sampler")
        return keep_indices


def accepts(sampler: Callable[..., Tensor], **options: object) -> bool:
    """Whether a sampler can be called with tokens, k and these options."""
    function = sampler.forward if isinstance(sampler, nn.Module) else sampler
    try:
        inspect.signature(function).bind(None, 0, **options)
    except TypeError:
        return False
    except ValueError:  # a function that is not written in Python may have no signature
        return not options
    return True


def _find_fault_of_form(keep_indices: object, tokens: Tensor, k: int) -> str | None:
    """What is wrong with the type, shape or device of indices, in words."""
    if not isinstance(keep_indices, Tensor):
        return f"a tensor, got {type(keep_indices).__name__}"
    if keep_indices.shape != (tokens.shape[0], k):
        return f"keep_indices of shape {(tokens.shape[0], k)}, got {tuple(keep_indices.shape)}"
    if keep_indices.dtype != torch.int64:
        return f"int64 indices, got {keep_indices.dtype}"
    if keep_indices.device != tokens.device:
        return f"indices on {tokens.device}, got {keep_indices.device}"
    return None


def _has_values(indices: Tensor) -> bool:
    """Whether a tensor's values can be read: not under `torch.compile`, `torch.export`, a trace, or on meta."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return False
    return type(indices) is Tensor and not indices.is_meta  # a FakeTensor is of a class of its own


def _find_fault_of_values(keep_indices: Tensor, num_patches: int, is_patch: Tensor | None) -> str | None:
    """What is wrong with the values of indices, in words; on a GPU this waits for them."""
    ordered = keep_indices.sort(dim=1).values
    num_repeated = (ordered[:, 1:] == ordered[:, :-1]).sum()
    lowest, highest, num_repeated = torch.stack((ordered.min(), ordered.max(), num_repeated)).tolist()
    if lowest < 0 or highest >= num_patches:
        return f"indices from 0 to {num_patches - 1}, got {lowest} to {highest}"
    if num_repeated:
        return f"each index at most once per image, got {num_repeated} again"
    if is_patch is not None:
        is_missed = is_patch.gather(1, keep_indices).sum(dim=1) < is_patch.sum(dim=1).clamp(max=keep_indices.shape[1])
        if is_missed.any():
            return "padding only where an image has no more patches, got padding in place of patches"
    return None


def describe(setting: object) -> str:
    """A `repr` without memory addresses: a function, or an object that has no `repr` of its own, is its dotted name."""
    owner = setting if hasattr(setting, "__qualname__") else type(setting)
    has_address = " at 0x" in repr(setting)
    return f"{owner.__module__}.{owner.__qualname__}" if has_address or owner is setting else repr(setting)
