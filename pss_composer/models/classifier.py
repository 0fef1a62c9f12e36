"""What all classifiers share: loss, metrics, and the blocks that FSDP and activation checkpointing wrap."""

from __future__ import annotations

from functools import partial
from typing import Any

from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


def find_blocks(vit: nn.Module) -> tuple[str, list[nn.Module]]:
    """The transformer blocks of a ViT: the largest `ModuleList` or `Sequential` of modules of one class.

    Returns:
        The dotted name of that list, and the blocks; of a model without one, as some CNNs are, "" and no blocks.
    """
    stacks = [
        (name, stack) for name, stack in vit.named_modules()
        if isinstance(stack, nn.ModuleList | nn.Sequential) and len({type(block) for block in stack}) == 1
        and any(next(block.children(), None) for block in stack)  # not the layers of a head
    ]
    if not stacks:
        return "", []
    name, stack = max(stacks, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))
    return name, list(stack.children())


def mark_blocks(vit: nn.Module) -> None:
    """Tell Composer which modules FSDP shards and activation checkpointing recomputes: a ViT's blocks."""
    _, blocks = find_blocks(vit)
    if not blocks:
        return
    is_block = partial(_is_of_class, type(blocks[0]))
    # Composer looks for these at the children of a ComposerModel
    for name in ("fsdp_wrap_fn", "activation_checkpointing_fn"):
        setattr(vit, name, is_block)


def _is_of_class(block_class: type[nn.Module], module: nn.Module) -> bool:
    return isinstance(module, block_class)


class ViTClassifier(ComposerClassifier):
    """A ViT with soft-target cross-entropy and top-1 and top-5 accuracy.

    Batches are pairs of images (B, 3, H, W) and labels, (B,) int64 or (B, classes) soft.

    Args:
        vit: A ViT, from images to logits (B, classes); it is `self.module`.
        num_classes: Classes of its head; None takes timm's `vit.num_classes`.
    """

    def __init__(self, vit: Any, num_classes: int | None = None) -> None:
        num_classes = vit.num_classes if num_classes is None else num_classes
        top1 = MulticlassAccuracy(num_classes, average="micro")
        top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        super().__init__(
            vit,
            train_metrics=MetricCollection({"top1": top1.clone()}),
            val_metrics=MetricCollection({"cross_entropy": CrossEntropy(), "top1": top1, "top5": top5}),
            # torch's own takes soft targets; Composer's soft_cross_entropy adds checks that wait for the GPU
            loss_fn=cross_entropy,
        )
        mark_blocks(vit)

    @property
    def vit(self) -> Any:
        """The ViT."""
        return self.module

    def enable_activation_checkpointing(self) -> None:
        """Recompute the activations of blocks in the backward pass, in the library's own way."""
        self.vit.set_grad_checkpointing()

    def update_metric(self, batch: tuple[Tensor, Tensor], outputs: Tensor, metric: Metric) -> None:
        _, targets = batch
        if targets.ndim == 2:  # under mixup and CutMix, the class with the larger share counts
            targets = targets.argmax(dim=1)
        metric.update(outputs, targets)
