"""SimMIM (Xie et al. 2022, https://arxiv.org/abs/2111.09886): pre-training as a ComposerModel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from composer.models import ComposerModel
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torchmetrics import MeanMetric, Metric

from pss_composer.models.classifier import mark_blocks
from pss_composer.models.shape import ViTShape
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.sampling import PatchSampler, gather_tokens


class Reconstruction(NamedTuple):
    """The output of `SimMIM` for a batch.

    Args:
        pixels: Values of the k patches that the encoder saw, (B, k, 3 * patch_size ** 2): channel by channel, each row
            by row.
        keep_indices: Which patches these are, (B, k) int64; None when the encoder saw all of them, in order.
    """

    pixels: Tensor
    keep_indices: Tensor | None


class MaskTokens(nn.Module):
    """Puts a learned token in the place of every masked patch token; it is in the slot `patch_embed.norm`.

    Args:
        embed_dim: Width of a token, C.

    Attributes:
        mask: Patches that the next forward pass masks, (B, N) bool; None masks nothing.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.mask: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        if self.mask is None:
            return tokens
        return torch.where(self.mask.unsqueeze(2), self.mask_token.to(tokens.dtype), tokens)


class SimMIM(ComposerModel):
    """Pre-trains a ViT to paint in the masked patches of images: the linear decoder, and L1 loss on masked pixels.

    Batches are pairs of images (B, 3, H, W) and a mask of their patches (B, H / p, W / p), bool; the algorithm
    `PatchMasking` puts the mask there. The loss is the mean absolute error over the masked pixels. Under patch sampling
    (this project's extension; the paper samples in fine-tuning alone) tokens are sampled when the mask tokens are in
    place, and the mean goes over the masked pixels of the tokens that stay: its scale does not depend on the keep rate.

    Args:
        encoder: A timm `VisionTransformer` or `Beit` with square patches; it loses its head and pooling.
            `build_encoder` makes SimMIM's own.

    Raises:
        TypeError: An encoder of another class, or one with a layer in the slot for the mask tokens.
    """

    def __init__(self, encoder: VisionTransformer | Beit) -> None:
        super().__init__()
        # the distilled one splits its output into two heads
        is_known = isinstance(encoder, VisionTransformer | Beit) and not isinstance(encoder, VisionTransformerDistilled)
        if not is_known:
            raise TypeError(f"encoder must be a timm VisionTransformer or Beit, got {type(encoder).__name__}")
        patch_embed = encoder.patch_embed
        has_slot = type(patch_embed) is PatchEmbed and patch_embed.flatten and isinstance(patch_embed.norm, nn.Identity)
        if not has_slot or patch_embed.patch_size[0] != patch_embed.patch_size[1]:
            raise TypeError("encoder must have timm's PatchEmbed with square patches, a fixed image size and no norm, "
                            f"got {patch_embed}")
        encoder.reset_classifier(0, global_pool="")
        self.patch_size: int = patch_embed.patch_size[0]
        patch_embed.norm = MaskTokens(encoder.embed_dim)
        self.encoder = encoder
        self.decoder = nn.Linear(encoder.embed_dim, 3 * self.patch_size**2)
        mark_blocks(encoder)
        self._masked_l1 = MeanMetric()

    @property
    def vit(self) -> VisionTransformer | Beit:
        return self.encoder

    def no_weight_decay(self) -> set[str]:
        """Parameters that are exempt from weight decay, in timm's way: those that the encoder exempts."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def forward(self, batch: tuple[Tensor, Tensor]) -> Reconstruction:
        images, mask = batch
        grid_size = self.encoder.patch_embed.grid_size
        if mask.dtype != torch.bool or mask.shape != (len(images), *grid_size):
            raise ValueError(f"batch must hold images and a bool mask of shape {(len(images), *grid_size)}, got "
                             f"{mask.dtype} of {tuple(mask.shape)}: add PatchMasking() to the algorithms")
        mask_tokens, patch_sampler = self.encoder.patch_embed.norm, self._find_sampler()
        mask_tokens.mask = mask.flatten(1)
        if patch_sampler is not None and isinstance(patch_sampler.sampler, StratifiedSampler):
            patch_sampler.sampler.mask = mask_tokens.mask
        tokens = self.encoder(images)[:, self.encoder.num_prefix_tokens:]
        mask_tokens.mask = None
        return Reconstruction(self.decoder(tokens), None if patch_sampler is None else patch_sampler.keep_indices)

    def loss(self, outputs: Reconstruction, batch: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean absolute error over the masked pixels of the patches that the encoder saw."""
        images, mask = batch
        targets, is_masked = self.patchify(images), mask.flatten(1)
        if outputs.keep_indices is not None:
            targets = gather_tokens(targets, outputs.keep_indices)
            is_masked = is_masked.gather(1, outputs.keep_indices)
        errors = (outputs.pixels.float() - targets).abs().sum(dim=2)
        num_masked_pixels = is_masked.sum() * self.patch_size**2
        # the constant is the original's; the 3 are the channels
        return (errors * is_masked).sum() / (num_masked_pixels + 1e-5) / 3

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as patches (B, N, 3 * patch_size ** 2), in the order of the decoder's outputs."""
        return pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """The inverse of `patchify`: (B, N, 3 * patch_size ** 2) to images (B, 3, H, W)."""
        return pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size), self.patch_size)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {"masked_l1": self._masked_l1}

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Reconstruction, metric: Metric) -> None:
        metric.update(self.loss(outputs, batch), weight=len(batch[0]))

    def _find_sampler(self) -> PatchSampler | None:
        # no generator: torch.compile would break the graph there
        samplers = [module for module in self.encoder.modules() if isinstance(module, PatchSampler)]
        return samplers[0] if samplers else None


def build_encoder(shape: ViTShape | None = None) -> Beit:
    """SimMIM's ViT for pre-training: one relative position bias that all blocks share, layer scale 0.1, no positions.

    Args:
        shape: The sizes of the model; the number of classes is not used. None is ViT-B.

    Raises:
        InputError: Sizes that break a rule.
    """
    arguments = (shape or ViTShape("base")).to_timm(has_head=False)
    return Beit(**arguments, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, init_values=0.1, global_pool="")
