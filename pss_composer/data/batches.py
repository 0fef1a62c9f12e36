"""From samples to a batch in a loader's worker, and from that to the model's input on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate

from pss_composer.errors import InputError

# image or None, label, and a message for each bad sample that was met on the way to this one
Sample = tuple[Tensor | None, int, list[str]]

MAX_REPLACEMENTS = 100


class BadSample(InputError):
    """A sample that cannot be read; one line that names it and the reason."""


def load_sample(
    load: Callable[[int], tuple[Tensor, int]], index: int, *, num_samples: int, on_bad_sample: str
) -> Sample:
    """Load a sample, or do what is to be done about a bad one.

    Args:
        load: Loads the image and label of an index, or raises `BadSample`.
        index: Of the sample.
        num_samples: Of the data.
        on_bad_sample: `raise`; `replace` by the next sample that can be read, so that batches stay full; `leave_out`.

    Returns:
        The sample, without an image where it is to be left out.

    Raises:
        BadSample: Under `raise`; or so many follow each other that the data must be broken.
    """
    messages: list[str] = []
    while True:
        try:
            image, label = load((index + len(messages)) % num_samples)
            return image, label, messages
        except BadSample as error:
            if on_bad_sample == "raise":
                raise
            messages.append(str(error))
            if on_bad_sample == "leave_out":
                return None, -1, messages
            if len(messages) > min(MAX_REPLACEMENTS, num_samples):
                raise BadSample(f"data must hold samples that can be read, got {len(messages)} bad ones in a row, "
                                f"the last: {error}") from None


class Collate:
    """Makes a batch of samples: images, labels (B,) int64, and the messages about bad ones.

    Args:
        repeats: Views of an image that follow each other. They are dealt apart, since mixup and CutMix mix neighbours,
            and an image is not to be mixed with itself.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[str]]:
        samples = [sample for first in range(self.repeats) for sample in samples[first::self.repeats]]
        messages = [message for *_, messages in samples for message in messages]
        good = [(image, label) for image, label, _ in samples if image is not None]
        if not good:
            raise BadSample(f"data must hold an image that can be read in every batch, got none: {messages[0]}")
        images, labels = default_collate(good)
        return images, labels, messages


class DeviceTransform:
    """Normalizes a whole batch, and erases rectangles in it (https://arxiv.org/abs/1708.04896), on the device.

    Draws from the global generators, Python's for the rectangles and torch's for the noise in them.

    Args:
        mean: Of the red, green and blue channels, in [0, 1].
        std: Of the red, green and blue channels.
        random_erasing: Probability, for each image, of filling one rectangle with normal noise, as timm does.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], random_erasing: float) -> None:
        self.mean = 255 * torch.tensor(mean).view(3, 1, 1)
        self.std = 255 * torch.tensor(std).view(3, 1, 1)
        self.random_erasing = random_erasing

    def __call__(self, images: Tensor) -> Tensor:
        """Images as a transform of `data.transforms` makes them, to normalized float32 (B, 3, H, W).

        Args:
            images: On the device, uint8 (B, H, W, 3); float32 (B, 3, H, W) is normalized already and stays as it is.
        """
        if images.dtype != torch.uint8:
            return images
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self.mean).div_(self.std)
        if self.random_erasing:
            # here, not in __init__: timm's object holds its device
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        return images
