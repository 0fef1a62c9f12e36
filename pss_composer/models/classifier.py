"""What the classifiers have in common: sizes, loss, metrics, and what FSDP and checkpointing wrap."""

from __future__ import annotations

from typing import Any

from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from timm.models import beit, vision_transformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

# the sizes of Touvron et al. 2021 (https://arxiv.org/abs/2012.12877)
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


def vit_arguments(
    size: str,
    *,
    image_size: int,
    patch_size: int,
    num_classes: int | None,
    drop_path: float,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """What timm's ViT classes take, checked; `num_classes` None is a ViT without a head.

    Raises:
        ValueError: Unknown size, or numbers that do not fit together.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    shape = SIZES[size] | {name: value for name, value in given.items() if value is not None}
    for name, value in {"image_size": image_size, "patch_size": patch_size, **shape}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_classes is not None and num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if image_size % patch_size:
        raise ValueError(f"image_size must be divisible by patch_size={patch_size}, got {image_size}")
    if shape["embed_dim"] % shape["num_heads"]:
        raise ValueError(f"embed_dim must be divisible by num_heads={shape['num_heads']}, got {shape['embed_dim']}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path must be in [0, 1), got {drop_path}")
    return {
        "img_size": image_size, "patch_size": patch_size, "num_classes": num_classes or 0,
        "drop_path_rate": drop_path, **shape,
    }


def is_block(module: nn.Module) -> bool:
    """Whether a module is a transformer block: the unit that FSDP shards and activation checkpointing recomputes."""
    return isinstance(module, vision_transformer.Block | beit.Block)


class ViTClassifier(ComposerClassifier):
    """A timm ViT with soft-target cross-entropy and top-1 and top-5 accuracy.

    Batches are pairs of images (B, 3, H, W) and labels, (B,) int64 or (B, classes) soft.

    Args:
        vit: A timm ViT; it is `self.module`.
    """

    def __init__(self, vit: nn.Module) -> None:
        num_classes = vit.num_classes
        top1 = MulticlassAccuracy(num_classes, average="micro")
        top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        super().__init__(
            vit,
            train_metrics=MetricCollection({"top1": top1.clone()}),
            val_metrics=MetricCollection({"cross_entropy": CrossEntropy(), "top1": top1, "top5": top5}),
            # torch's own takes soft targets; Composer's soft_cross_entropy adds checks that wait for the GPU
            loss_fn=cross_entropy,
        )
        # Composer asks the ComposerModel's children, not itself
        vit.fsdp_wrap_fn = is_block
        vit.activation_checkpointing_fn = is_block

    @property
    def vit(self) -> nn.Module:
        return self.module

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Tensor, metric: Metric) -> None:
        _, targets = batch
        if targets.ndim == 2:  # under mixup and cutmix the larger part of the label counts
            targets = targets.argmax(dim=1)
        metric.update(outputs, targets)
