"""Mixup and CutMix, one of the two for every batch, as in the training of DeiT and SimMIM."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torchvision.transforms import v2

from pss_composer.checks import raise_errors
from pss_composer.errors import InputError
from pss_composer.training.recipe import MixingSettings


class MixUpCutMix(Algorithm):
    """Mixes every training batch with itself: CutMix with probability `switch_prob`, else mixup.

    Mixup (https://arxiv.org/abs/1710.09412) blends two images, CutMix (https://arxiv.org/abs/1905.04899)
    pastes a rectangle of one into the other; the labels become shares of the two classes. Runs on
    `Event.AFTER_DATALOADER`, on the device: images (B, 3, H, W) and labels (B,) become images and soft labels
    (B, num_classes), before the batch is split into microbatches.

    All draws come from torch's CPU generator, whose state Composer keeps in checkpoints, so a resumed run
    mixes as it would have without the stop, and no draw waits for the GPU.

    Args:
        num_classes: Classes, at least 1.
        mixup_alpha: Both parameters of the Beta distribution of mixup's shares; 0 turns mixup off.
        cutmix_alpha: The same for CutMix.
        switch_prob: Probability of CutMix where both are on, in [0, 1].

    Raises:
        ValueError: An argument is out of its range, or both alphas are 0.

    Example:
        `Trainer(algorithms=[MixUpCutMix(1000), LabelSmoothing(0.1)], ...)`
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        switch_prob: float = 0.5,
    ) -> None:
        if num_classes < 1:
            raise InputError(f"must be at least 1, got {num_classes}", key="num_classes")
        raise_errors(MixingSettings(mixup_alpha, cutmix_alpha, switch_prob).check())
        self.num_classes = num_classes
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.switch_prob = switch_prob
        self._mixup = v2.MixUp(alpha=mixup_alpha, num_classes=num_classes) if mixup_alpha > 0 else None
        self._cutmix = v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes) if cutmix_alpha > 0 else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_classes}, mixup_alpha={self.mixup_alpha}, "
            f"cutmix_alpha={self.cutmix_alpha}, switch_prob={self.switch_prob})"
        )

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        # Composer moves the microbatches to the device later, which then has no effect
        images, labels = state.device.batch_to_device(state.batch)
        state.batch = self._choose()(images, labels)

    def _choose(self) -> v2.MixUp | v2.CutMix:
        if self._mixup is None or self._cutmix is None:
            return self._mixup or self._cutmix
        return self._cutmix if torch.rand((), device="cpu").item() < self.switch_prob else self._mixup
