"""Images from a folder with one sub-folder per class."""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from pss_composer.data.sources import Pictures, Request
from pss_composer.errors import InputError, to_line


def open_images(request: Request) -> FolderImages:
    """The class folders in the folder of the split."""
    return FolderImages(request, request.find_split())


class FolderImages(Pictures):
    """The images that torchvision's `ImageFolder` finds, in its order and with its labels.

    Args:
        request: What the source is asked for.
        folder: Folder of one split, with a sub-folder per class.

    Raises:
        InputError: A class without images or one that cannot be read, more classes than the model distinguishes, or a
            split whose classes are not those of the split `train` beside it.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        super().__init__(request)
        try:
            self.classes, numbers = find_classes(folder)
            for name in self.classes:
                os.scandir(folder / name).close()  # torchvision takes a folder that cannot be read for an empty one
            self.samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise InputError(f"must hold a folder of images per class: {to_line(error)}", key="path") from None
        except OSError as error:
            raise InputError(f"must hold class folders that can be read, got {error.filename!r}: {error.strerror}",
                             key="path") from error
        request.require_classes(len(self.classes), f"the class folders in {str(folder)!r}")
        # the label of a class is its place in the alphabet: one name more or less shifts the others
        train_folder = folder.parent / "train"
        if train_folder.is_dir() and find_classes(train_folder)[0] != self.classes:
            raise InputError(
                f"must hold the same class folders in every split, got others in {str(folder)!r}", key="path"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[bytes, int]:
        path, label = self.samples[index]
        return Path(path).read_bytes(), label

    def name(self, index: int) -> str:
        return repr(self.samples[index][0])
