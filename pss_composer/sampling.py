"""Which patch tokens stay: samplers, the gather, and the module in a model's slot.

A sampler is a function `(tokens, k) -> keep_indices` from patch tokens (B, N, C), without prefix tokens, to the
int64 indices (B, k) of those that stay, each at most once per image, in any order. A ViT that pads images to a common
length also passes `is_patch` (B, N) by this name, False for padding, which stays only where an image has fewer than k
patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pss_composer.errors import InputError
from pss_composer.sampler_checks import SamplerChecks, accepts, describe
from pss_composer.schedules import check_keep_rate

Sampler = Callable[..., Tensor]


def sample_by_magnitude(tokens: Tensor, k: int, is_patch: Tensor | None = None) -> Tensor:
    """The k tokens with the largest L1 norm over channels: the paper's sampler."""
    return _select(tokens.abs().sum(dim=-1, dtype=torch.float32), k, is_patch)


def sample_by_l2_magnitude(tokens: Tensor, k: int, is_patch: Tensor | None = None) -> Tensor:
    """The k tokens with the largest L2 norm over channels."""
    return _select(tokens.float().square().sum(dim=-1), k, is_patch)


def sample_at_random(tokens: Tensor, k: int, is_patch: Tensor | None = None) -> Tensor:
    """A fresh random set of k tokens for every image, from the global generator of the tokens' device."""
    return _select(torch.rand(tokens.shape[:2], device=tokens.device), k, is_patch)


def _select(scores: Tensor, k: int, is_patch: Tensor | None) -> Tensor:
    """The places of the k largest scores, (B, k); scores are at least 0."""
    if is_patch is not None:
        scores = scores.masked_fill(~is_patch, -1.0)
    return scores.topk(k, sorted=False).indices


SAMPLERS: dict[str, Sampler] = {
    "magnitude": sample_by_magnitude,
    "l2_magnitude": sample_by_l2_magnitude,
    "random": sample_at_random,
}


def resolve_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name, or the function itself.

    Raises:
        InputError: Neither the name of a sampler nor a function of tokens and k.
    """
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if callable(sampler) and not isinstance(sampler, type) and accepts(sampler):
        return sampler
    raise InputError(
        f"must be one of {', '.join(SAMPLERS)} or a function (tokens, k) -> keep_indices, got {sampler!r}",
        key="sampler",
    )


def num_keep(keep_rate: float, num_patches: int, num_prefix_tokens: int = 1) -> int:
    """How many patch tokens stay at a keep rate.

    The paper's count: the keep rate is a share of all tokens, prefix included, and the prefix always stays. Of
    196 patches and a class token 38, 78, 117, 157, 196 stay at ρ = 0.2, 0.4, 0.6, 0.8, 1. At least one stays.

    Args:
        keep_rate: Share of the tokens to keep, in (0, 1].
        num_patches: Patch tokens of an image, N.
        num_prefix_tokens: Class, distillation and register tokens.
    """
    num_tokens = num_patches + num_prefix_tokens
    return max(1, round(keep_rate * num_tokens) - num_prefix_tokens)


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """The tokens at the indices, image by image.

    Args:
        tokens: (B, N, C).
        indices: (B, k), int64.

    Returns:
        (B, k, C).
    """
    B, N, C = tokens.shape
    # rows of one long (B * N, C) matrix: index_select copies whole tokens where gather copies single numbers
    first_rows = torch.arange(0, B * N, N, device=indices.device).unsqueeze(1)
    return tokens.reshape(B * N, C).index_select(0, (first_rows + indices).flatten()).view(B, -1, C)


def set_in_forward(module: nn.Module, **attributes: object) -> None:
    """Set attributes of a module in a forward pass.

    `torch.export` with `strict=True` refuses a plain assignment of a tensor there, but not this.
    """
    for name, value in attributes.items():
        setattr(module, name, value)


class PatchSampler(nn.Module):
    """Keeps a share of an image's patch tokens; the module that `apply_patch_sampling` puts into a model.

    It has no parameters or buffers of its own, so a model's checkpoint is the same with and without it. While every
    token is kept, it returns its input itself.

    Args:
        sampler: `magnitude`, `l2_magnitude`, `random`, or a function of the patch tokens
            `(tokens (B, N, C), k) -> keep_indices (B, k)`, of which `SamplerChecks` checks the results.
        num_prefix_tokens: Tokens before the first patch token; they always stay.
        keep_rate: Share of the tokens kept in training, in (0, 1].
        eval_keep_rate: Share of the tokens kept in evaluation and prediction, in (0, 1].

    Attributes:
        keep_indices: Patch tokens kept in the last forward pass, (B, k) int64 with the prefix excluded; None when
            every token was kept.
        num_tokens: Tokens that left the last forward pass, prefix included; None before the first.
        edits: What `surgery` changed in the model, (module, attribute, value before).

    Raises:
        ValueError: Unknown sampler, or a keep rate outside (0, 1].
    """

    def __init__(
        self,
        sampler: str | Sampler = "magnitude",
        *,
        num_prefix_tokens: int = 1,
        keep_rate: float = 1.0,
        eval_keep_rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_indices: Tensor | None = None
        self.num_tokens: int | None = None
        self.edits: list[tuple[nn.Module, str, Any]] = []
        self.configure(sampler, keep_rate=keep_rate, eval_keep_rate=eval_keep_rate)

    def configure(self, sampler: str | Sampler, *, keep_rate: float, eval_keep_rate: float) -> None:
        """Set the sampler and both keep rates, as the constructor does."""
        self._checks = SamplerChecks(resolve_sampler(sampler))
        self._modules.pop("sampler", None)  # torch would not let a name take the place of a module
        self.sampler = sampler
        self.keep_rate = keep_rate
        self.eval_keep_rate = eval_keep_rate

    @property
    def keep_rate(self) -> float:
        return self._keep_rate

    @keep_rate.setter
    def keep_rate(self, value: float) -> None:
        self._keep_rate = check_keep_rate(value, "keep_rate")

    @property
    def eval_keep_rate(self) -> float:
        return self._eval_keep_rate

    @eval_keep_rate.setter
    def eval_keep_rate(self, value: float) -> None:
        self._eval_keep_rate = check_keep_rate(value, "eval_keep_rate")

    @contextmanager
    def evaluating_at(self, keep_rate: float) -> Iterator[None]:
        """Set another `eval_keep_rate` within the block, and the old one again after it."""
        before = self.eval_keep_rate
        self.eval_keep_rate = keep_rate
        try:
            yield
        finally:
            self.eval_keep_rate = before

    @property
    def current_keep_rate(self) -> float:
        """The keep rate of the mode that the module is in: training, or evaluation."""
        return self._keep_rate if self.training else self._eval_keep_rate

    def forward(self, tokens: Tensor, is_patch: Tensor | None = None) -> Tensor:
        """From tokens (B, P + N, C), P of them prefix tokens, to (B, P + k, C).

        Args:
            tokens: The tokens.
            is_patch: (B, N) bool, False for padding; None where every image has N patches.
        """
        keep_indices = self.select(tokens[:, self.num_prefix_tokens:], is_patch)
        return tokens if keep_indices is None else gather_tokens(tokens, self._to_positions(keep_indices))

    def select(self, patch_tokens: Tensor, is_patch: Tensor | None = None) -> Tensor | None:
        """Which of the patch tokens (B, N, C) stay, for a ViT whose prefix tokens come later.

        Returns:
            `keep_indices`, (B, k), or None where all tokens stay.

        Raises:
            InputError: A sampler of one's own returned something else, or takes no `is_patch` for padded images.
        """
        num_patches = patch_tokens.shape[1]
        if isinstance(num_patches, Tensor):  # in torch.jit.trace, whose graph is for one number of tokens
            num_patches = int(num_patches)
        k = num_keep(self.current_keep_rate, num_patches, self.num_prefix_tokens)
        set_in_forward(self, num_tokens=self.num_prefix_tokens + k, keep_indices=None)
        if k == num_patches:
            return None
        if isinstance(self.sampler, str):
            keep_indices = SAMPLERS[self.sampler](patch_tokens.detach(), k, is_patch)
        else:
            keep_indices = self._checks.run(self.sampler, patch_tokens.detach(), k, is_patch)
        set_in_forward(self, keep_indices=keep_indices)
        return keep_indices

    def kept_positions(self) -> Tensor | None:
        """Positions of the kept tokens in the input of the last forward pass: (B, P + k), or None if all were kept."""
        return None if self.keep_indices is None else self._to_positions(self.keep_indices)

    def _to_positions(self, keep_indices: Tensor) -> Tensor:
        prefix = torch.arange(self.num_prefix_tokens, device=keep_indices.device).expand(keep_indices.shape[0], -1)
        return torch.cat((prefix, keep_indices + self.num_prefix_tokens), dim=1)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has seen no tokens; and what torch.export leaves in these attributes does not pickle
        return self.__dict__ | {"keep_indices": None, "num_tokens": None}

    def extra_repr(self) -> str:
        return (f"sampler={describe(self.sampler)}, num_prefix_tokens={self.num_prefix_tokens}, "
                f"keep_rate={self.keep_rate}, eval_keep_rate={self.eval_keep_rate}")
