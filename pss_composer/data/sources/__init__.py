"""The sources of images: a module each, which is imported when it is asked for.

A module `NAME` makes the source `data.name=NAME`. It has one function, `open_images(request: Request) -> Dataset`. A
map-style dataset takes the keys (epoch, index, view) of `loader.EpochSampler`; an iterable one divides itself among the
devices and has its number of images as `size`. Both yield `samples.Sample`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pss_composer.data.augmentation.transforms import Transform
from pss_composer.data.settings import DataSettings
from pss_composer.errors import InputError


@dataclass
class Request:
    """What a source needs to know to open a split.

    Args:
        settings: Settings of the data.
        split: `train` or `val`.
        transform: From a picture (the bytes of a file, or a PIL image) and a seed to a tensor.
        image_size: Height and width that the model sees, in pixels.
        num_classes: Classes that the model tells apart; None where labels are not used.
        batch_size: Images in the batch of one device.
        repeats: Views of each image that is drawn.
        seed: Seeds the order and the transform.
        on_bad_sample: `raise`, `replace` or `leave_out`, as for `samples.load_sample`.
    """

    settings: DataSettings
    split: str
    transform: Transform
    image_size: int
    num_classes: int | None
    batch_size: int
    repeats: int
    seed: int
    on_bad_sample: str

    def find_folder(self) -> Path:
        """The folder `path`.

        Raises:
            InputError: It is not there.
        """
        path = self.settings.path
        if path is None or not Path(path).is_dir():
            raise InputError(f"must be a folder, got {path!r}, which is not one", key="path")
        return Path(path)

    def find_split(self) -> Path:
        """The folder of the split in `path`.

        Raises:
            InputError: It is not there, or empty.
        """
        folder = self.find_folder() / self.split
        if not folder.is_dir() or not any(folder.iterdir()):
            raise InputError(f"must hold a folder {self.split!r} with images, got none in {self.settings.path!r}",
                             key="path")
        return folder
