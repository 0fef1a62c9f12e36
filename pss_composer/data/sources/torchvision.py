"""Images of a data set that torchvision knows by name, like FashionMNIST or Food101."""

from __future__ import annotations

import contextlib

import numpy as np
from composer.utils import dist
from PIL import Image
from torchvision import datasets

from pss_composer.data.augmentation.decoding import BadImage
from pss_composer.data.settings import TORCHVISION_SPLITS
from pss_composer.data.sources import Pictures, Request
from pss_composer.errors import InputError, to_line


def open_images(request: Request) -> TorchvisionImages:
    """A split of the data set; with `download=true`, torchvision first downloads the files that are not there.

    Raises:
        InputError: The files cannot be downloaded, are missing or broken, or `TorchvisionImages` refuses the data set.
    """
    name, download = str(request.settings.dataset), request.settings.download
    path = str(request.path if download else request.find_folder())
    train_options, val_options = TORCHVISION_SPLITS[name]
    options = train_options if request.split == "train" else val_options
    try:
        # one process of each machine downloads, and the others wait
        with dist.run_local_rank_zero_first() if download else contextlib.nullcontext():
            dataset = getattr(datasets, name)(path, **options, download=download)
    except Exception as error:  # torchvision has no common class of errors for files that are missing or broken
        if download:
            raise InputError(f"must get {name} into {path!r}, got {_describe(error)}", key="download") from error
        raise InputError(f"must hold {name} as torchvision stores it (or set download=true), "
                         f"got {path!r}: {_describe(error)}", key="path") from error
    return TorchvisionImages(request, dataset)


class TorchvisionImages(Pictures):
    """A data set of torchvision.

    Args:
        request: What the source is asked for.
        dataset: Its items are a PIL image and a label.

    Raises:
        InputError: No images, not as many labels as images, or more classes than the model distinguishes.
    """

    def __init__(self, request: Request, dataset: datasets.VisionDataset) -> None:
        super().__init__(request)
        self.dataset = dataset
        self.classes = list(getattr(dataset, "classes", ()))
        self.title = f"{request.settings.dataset} in {request.settings.path!r}"
        labels = _find_labels(dataset)
        if len(dataset) == 0:
            raise InputError(f"must hold at least one image, got none of {self.title}", key="path")
        if labels is not None and len(labels) != len(dataset):
            raise InputError(f"must hold as many labels as images, got {len(labels)} labels for the {len(dataset)} "
                             f"images of {self.title}", key="path")
        # some data sets have no list of classes, others no list of labels
        num_classes = max(len(self.classes), 0 if labels is None else 1 + int(labels.max()))
        request.require_classes(num_classes, f"the labels of {self.title}")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
        except Exception as error:  # torchvision has no common class of errors for broken files
            raise BadImage(_describe(error)) from error
        return image, int(label)

    def name(self, index: int) -> str:
        return f"image {index} of {self.title}"


def _find_labels(dataset: datasets.VisionDataset) -> np.ndarray | None:
    """The labels (N,) of all images, or None; torchvision's classes have them under different names, or not at all."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    samples = getattr(dataset, "_samples", None)
    return None if samples is None else np.array([label for _, label in samples])


def _describe(error: Exception) -> str:
    """The class and the message of an error; torchvision also raises assertions without a message."""
    return f"{type(error).__name__}: {to_line(error)}"
