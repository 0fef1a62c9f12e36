"""What all classifiers share: loss, metrics, and the blocks that FSDP and activation checkpointing wrap."""

from __future__ import annotations

from typing import Any

from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from timm.models import beit, vision_transformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def is_block(module: nn.Module) -> bool:
    """Whether a module is a transformer block: the unit that FSDP shards and activation checkpointing recomputes."""
    return isinstance(module, vision_transformer.Block | beit.Block)


class ViTClassifier(ComposerClassifier):
    """A timm ViT with soft-target cross-entropy and top-1 and top-5 accuracy.

    Batches are pairs of images (B, 3, H, W) and labels, (B,) int64 or (B, classes) soft.

    Args:
        vit: A timm ViT; it is `self.module`.
    """

    def __init__(self, vit: Any) -> None:
        num_classes: int = vit.num_classes
        top1 = MulticlassAccuracy(num_classes, average="micro")
        top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        super().__init__(
            vit,
            train_metrics=MetricCollection({"top1": top1.clone()}),
            val_metrics=MetricCollection({"cross_entropy": CrossEntropy(), "top1": top1, "top5": top5}),
            # torch's own takes soft targets; Composer's soft_cross_entropy adds checks that wait for the GPU
            loss_fn=cross_entropy,
        )
        # Composer looks for these at the children of a ComposerModel
        vit.fsdp_wrap_fn = is_block
        vit.activation_checkpointing_fn = is_block

    @property
    def vit(self) -> Any:
        """The timm ViT."""
        return self.module

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Tensor, metric: Metric) -> None:
        _, targets = batch
        if targets.ndim == 2:  # under mixup and CutMix, the class with the larger share counts
            targets = targets.argmax(dim=1)
        metric.update(outputs, targets)
