"""What a worker of the loader makes: samples and batches of them, or an error in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import default_collate

from pss_composer.errors import InputError

# image or None, label, and a message for each bad sample that was met on the way to this one; or why there is none
Sample = tuple[Tensor | None, int, list[str]] | InputError

MAX_REPLACEMENTS = 100


class BadSample(InputError):
    """A sample that cannot be read; one line that names it and the reason."""


def load_sample(
    load: Callable[[int], tuple[Tensor, int]], index: int, *, num_samples: int, on_bad_sample: str
) -> Sample:
    """Load a sample, or do what is to be done about a bad one.

    Args:
        load: Loads the image and label of an index, or raises `BadSample` or another `InputError`.
        index: Of the sample.
        num_samples: Of the data.
        on_bad_sample: `raise`; `replace` by the next sample that can be read, so that batches stay full; `leave_out`.

    Returns:
        The sample, without an image where it is to be left out. An error instead, for `Loader` to raise in the main
        process: a bad sample under `raise`; so many in a row that the data must be broken; any other `InputError`.
    """
    messages: list[str] = []
    while True:
        try:
            image, label = load((index + len(messages)) % num_samples)
            return image, label, messages
        except BadSample as error:
            if on_bad_sample == "raise":
                return error
            messages.append(str(error))
            if on_bad_sample == "leave_out":
                return None, -1, messages
            if len(messages) > min(MAX_REPLACEMENTS, num_samples):
                return BadSample(f"data must hold samples that can be read, got {len(messages)} bad ones in a row, "
                                 f"the last: {error}")
        except InputError as error:
            return error


class Collate:
    """Makes a batch of samples: images, labels (B,) int64, and the messages about bad ones; or passes on an error.

    Args:
        repeats: Views of an image that follow each other. They are placed apart, since mixup and CutMix mix neighbours,
            and an image is not to be mixed with itself.
    """

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def __call__(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[str]] | InputError:
        ordered = []
        for sample in (sample for first in range(self.repeats) for sample in samples[first::self.repeats]):
            if isinstance(sample, InputError):
                return sample
            ordered.append(sample)
        messages = [message for *_, messages in ordered for message in messages]
        good = [(image, label) for image, label, _ in ordered if image is not None]
        if not good:
            return BadSample(f"data must hold an image that can be read in every batch, got none: {messages[0]}")
        images, labels = default_collate(good)
        return images, labels, messages
