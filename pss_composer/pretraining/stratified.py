"""The sampler for pre-training under patch sampling: masked and visible patches are kept separately."""

from __future__ import annotations

import torch
from torch import Tensor

from pss_composer.errors import InputError


class StratifiedSampler:
    """Keeps a chosen share of masked patches among the tokens that stay, at random within masked and visible ones.

    For masked pre-training, this project's extension: `SimMIM` sets `mask` before every forward pass. If an image
    has too few patches of one kind, more of the other kind stay.

    Args:
        masked_share: Share of masked patches among the k tokens that stay, in (0, 1]. None is the share in the image,
            so that masked and visible patches stay at the same rate.

    Attributes:
        mask: Masked patches, (B, N) bool.

    Raises:
        ValueError: A share outside (0, 1]; when called: no mask for these tokens.
    """

    def __init__(self, masked_share: float | None = None) -> None:
        if masked_share is not None and not 0 < masked_share <= 1:
            raise InputError(f"must be in (0, 1], got {masked_share}", key="masked_share")
        self.masked_share = masked_share
        self.mask: Tensor | None = None

    def __repr__(self) -> str:
        return f"StratifiedSampler(masked_share={self.masked_share})"

    def __call__(self, tokens: Tensor, k: int) -> Tensor:
        B, N, _ = tokens.shape
        mask = self.mask
        if mask is None or mask.shape != (B, N):
            raise ValueError(f"mask must be of shape {(B, N)}, got {None if mask is None else tuple(mask.shape)}: "
                             "the stratified sampler is for SimMIM")
        num_masked = mask.sum(dim=1, keepdim=True)
        share = num_masked / N if self.masked_share is None else self.masked_share
        wanted = (share * torch.full_like(num_masked, k)).round().long()
        num_masked_kept = wanted.clamp(min=k - (N - num_masked), max=num_masked)
        # masked patches first, both kinds shuffled: the first ones of each kind stay
        order = (mask + torch.rand(B, N, device=mask.device)).argsort(dim=1, descending=True)
        places = torch.arange(k, device=mask.device).expand(B, k)
        return order.gather(1, places + (places >= num_masked_kept) * (num_masked - num_masked_kept))
