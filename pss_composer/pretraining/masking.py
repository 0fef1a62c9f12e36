"""SimMIM's masks: how they are drawn, and the algorithm that draws one for every batch."""

from __future__ import annotations

import math

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from pss_composer.checks import raise_errors
from pss_composer.pretraining.settings import MaskingSettings
from pss_composer.pretraining.simmim import SimMIM
from pss_composer.seeds import derive_seed


def draw_masks(
    num_images: int, grid_size: tuple[int, int], *, unit: int = 2, ratio: float = 0.6, generator: torch.Generator
) -> Tensor:
    """Draw SimMIM's random masks: the same number of whole units in each image.

    Args:
        num_images: Images, B.
        grid_size: Height and width of an image in patches, multiples of `unit`.
        unit: Height and width in patches of a unit, which is masked or visible as a whole.
        ratio: Share of the units that are masked, in (0, 1], rounded up to the next unit.
        generator: Where the random numbers come from; the masks are on its device.

    Returns:
        (B, height, width) bool, true where a patch is masked.
    """
    rows, columns = grid_size[0] // unit, grid_size[1] // unit
    num_masked = math.ceil(rows * columns * ratio)
    scores = torch.rand(num_images, rows * columns, generator=generator, device=generator.device)
    masked = scores.topk(num_masked, sorted=False).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, masked, True).view(num_images, rows, columns)
    return mask.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2)


class PatchMasking(Algorithm):
    """Draws the mask of every batch for `SimMIM` (Xie et al. 2022, https://arxiv.org/abs/2111.09886).

    Runs on `Event.BATCH_START`, and on the same event of evaluation and prediction, where it turns a batch of images,
    with or without labels, into a pair of images (B, 3, H, W) and mask (B, H / p, W / p) bool. Masks are drawn on the
    device and depend on seed, batch and rank: a run that resumes on the same number of processes and kind of device
    sees the same masks as without the stop, and every evaluation sees the same masks.

    Args:
        unit: Height and width in pixels of the squares that are masked, a multiple of the patch size.
        ratio: Share of the squares that are masked, in (0, 1].

    Raises:
        ValueError: A ratio outside (0, 1]; when the trainer starts: images that do not divide into units.
        TypeError: When the trainer starts: a model that is not a SimMIM.

    Example:
        >>> trainer = Trainer(model=SimMIM(build_encoder("base")), algorithms=[PatchMasking()], ...)
    """

    def __init__(self, unit: int = 32, ratio: float = 0.6) -> None:
        self.settings = MaskingSettings(unit, ratio)
        raise_errors(self.settings.check())

    def __repr__(self) -> str:
        return f"PatchMasking(unit={self.settings.unit}, ratio={self.settings.ratio})"

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START, Event.EVAL_BATCH_START, Event.PREDICT_BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._grid_size, self._patches_per_unit = _divide(state.model, self.settings)
            return
        is_training = event == Event.BATCH_START
        timestamp = {
            Event.BATCH_START: state.timestamp,
            Event.EVAL_BATCH_START: state.eval_timestamp,
            Event.PREDICT_BATCH_START: state.predict_timestamp,
        }[event]
        split = "train" if is_training else "eval"
        seed = derive_seed(state.rank_zero_seed, "mask", split, int(timestamp.batch), dist.get_global_rank())
        generator = torch.Generator(next(state.model.parameters()).device).manual_seed(seed)
        images = state.batch if isinstance(state.batch, Tensor) else state.batch[0]
        mask = draw_masks(
            len(images), self._grid_size, unit=self._patches_per_unit, ratio=self.settings.ratio, generator=generator
        )
        state.batch = (images, mask)


def _divide(model: torch.nn.Module, settings: MaskingSettings) -> tuple[tuple[int, int], int]:
    """The size of an image in patches, and of a unit in patches."""
    if not isinstance(model, SimMIM):
        raise TypeError(f"PatchMasking is for pretraining.simmim.SimMIM, got {type(model).__name__}")
    patch_embed = model.encoder.patch_embed
    raise_errors(settings.check_fit(patch_embed.img_size, model.patch_size))
    return patch_embed.grid_size, settings.unit // model.patch_size
