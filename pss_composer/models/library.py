"""ViTs of timm, transformers and torchvision as ComposerModels; what one library needs is in the file of its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pss_composer.errors import InputError, to_line
from pss_composer.models.classifier import ViTClassifier, find_blocks
from pss_composer.models.settings import LIBRARIES, OWN_SETTINGS, ModelSettings

# parts of the names of what is no matrix of a layer: as timm, it gets no weight decay
NO_WEIGHT_DECAY = ("pos_embed", "position_embedding", "cls_token", "class_token", "class_embedding", "dist_token",
                   "distillation_token", "reg_token", "register_tokens", "mask_token", "bias_table")
# what a constructor or a forward pass raises about arguments that do not fit
MISFITS = (TypeError, ValueError, AssertionError, RuntimeError, AttributeError, LookupError, ArithmeticError)


@dataclass
class Normalization:
    """The mean and the standard deviation, of red, green and blue, that pre-trained weights expect."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class LibraryClassifier(ViTClassifier):
    """A classifier of a library; the names of its weights are the library's.

    Args:
        module: The library's module.
        num_classes: Classes of its head.

    Attributes:
        loaded: What the library has loaded, in words; None if its weights are random.
        normalization: Of the pre-trained weights; None if there are none, or it is not known.
        patch_size: In pixels; None if it is not known.
    """

    HEAD: tuple[str, ...] = ()

    def __init__(self, module: Any, num_classes: int) -> None:
        super().__init__(module, num_classes)
        self.loaded: str | None = None
        self.normalization: Normalization | None = None
        self.patch_size: int | None = None

    def is_head(self, name: str) -> bool:
        """Whether a weight belongs to the task: a checkpoint may lack it, or have it for another task."""
        return name.startswith(self.HEAD)

    def convert_weights(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of the library's own file in this model's names and shapes, as far as the library converts them."""
        return weights


class IndexedClassifier(LibraryClassifier):
    """A classifier of a library that knows nothing of weight decay and layers."""

    def no_weight_decay(self) -> set[str]:
        """Parameters that are exempt from weight decay, in timm's way: tokens, positions and bias tables."""
        return {name for name, _ in self.named_parameters() if any(part in name for part in NO_WEIGHT_DECAY)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """From a parameter's name to its layer, in timm's way: the stem, the blocks, the head.

        What stands between the blocks and the head, a norm, belongs to the last block.

        Raises:
            InputError: The model has no blocks.
        """
        path, blocks = find_blocks(self.vit)
        if not blocks:
            raise InputError(f"must be null for {type(self.vit).__name__}, which has no list of blocks",
                             key="optimizer.layer_decay")
        prefix = f"module.{path}."
        names = [name for name, _ in self.named_parameters()]
        first = next(number for number, name in enumerate(names) if name.startswith(prefix))

        def find_layer(name: str) -> int:
            if name.startswith(prefix):
                # torchvision calls its blocks encoder_layer_0 and so on
                return 1 + int(name.removeprefix(prefix).split(".")[0].removeprefix("encoder_layer_"))
            if self.is_head(name.removeprefix("module.")):
                return 1 + len(blocks)
            return 0 if names.index(name) < first else len(blocks)

        return find_layer


def build_library_model(settings: ModelSettings, *, has_weights: bool) -> LibraryClassifier:
    """A library's model, with the library's own weights if the recipe asks for them.

    Args:
        settings: A recipe's `model`, with a library's name.
        has_weights: Whether `pretrained` counts; a resumed run has its own weights.

    Raises:
        InputError: The library is not installed, or does not know the model, its arguments or its sizes; or weights
            cannot be downloaded.
    """
    library = settings.library
    assert library is not None
    try:
        module = import_module(f"pss_composer.models.{LIBRARIES[library]}")
    except ModuleNotFoundError as error:
        raise InputError(f"needs {LIBRARIES[library]}, which is not installed: pip install {error.name}",
                         key="name") from error
    model: LibraryClassifier = module.build(settings, has_weights=has_weights)
    check_image_size(settings, model.patch_size)
    _freeze_unused(model, settings)
    return model


def check_image_size(settings: ModelSettings, patch_size: int | None) -> None:
    """Check that whole patches make up an image; null, of an unknown patch size, allows every image.

    Raises:
        InputError: They do not.
    """
    if patch_size is not None and settings.image_size % patch_size:
        raise InputError(f"must be a multiple of the patch size {patch_size} of {settings.name}, "
                         f"got {settings.image_size}", key="image_size")


def find_nearest(name: str, known: Collection[str], *, prefix: str = "") -> str:
    """A hint at the known name that is most like an unknown one, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


@contextmanager
def reporting_misfits(settings: ModelSettings) -> Iterator[None]:
    """Turn what a library's constructor raises into an `InputError` about the arguments, or else about the name."""
    try:
        yield
    except InputError:
        raise
    except MISFITS as error:
        for argument, key in OWN_SETTINGS[settings.library or ""].items():
            if str(error).endswith(f"unexpected keyword argument '{argument}'"):
                raise InputError(f"must be null for {settings.name}, which has no {argument}, got "
                                 f"{getattr(settings, key)}", key=key) from error
        arguments = settings.arguments
        rule = (f"must be what {settings.name} takes" if arguments else
                f"must be a model that takes the recipe's settings, image_size={settings.image_size} among them")
        raise InputError(f"{rule}, got {arguments or settings.name!r}: {to_line(error)}",
                         key="arguments" if arguments else "name") from error


@contextmanager
def reporting_download(settings: ModelSettings) -> Iterator[None]:
    """Turn what fails in a library's own loading of weights into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the libraries have no common class of errors, and a broken file can fail in any way
        raise InputError(f"must be weights of {settings.name} that can be loaded, got {settings.pretrained!r}: "
                         f"{to_line(error)}", key="pretrained") from error


def check_hub(name: str, key: str) -> None:
    """Try to reach the Hugging Face hub once; the libraries themselves try for half a minute.

    Args:
        name: What is wanted from there.
        key: The setting that asks for it.

    Raises:
        InputError: It cannot be reached.
    """
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # what has been downloaded before is used
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=10)
    except Exception as error:  # of one of several HTTP libraries
        other = "name a folder, like hf/FOLDER" if key == "name" else "give a file or a folder"
        raise InputError(f"needs {name} from {endpoint}, which cannot be reached ({type(error).__name__}): {other}, "
                         "or set HF_HUB_OFFLINE=1 if it has been downloaded before", key=key) from error


def _freeze_unused(model: LibraryClassifier, settings: ModelSettings) -> None:
    """Freeze the parameters that have no part in the logits, like a mask token: DDP waits for their gradients.

    Raises:
        InputError: The model does not take images of this size, or does not return logits.
    """
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    images = torch.zeros(1, 3, settings.image_size, settings.image_size)
    was_training = model.training
    model.eval()  # draws no random numbers
    try:
        logits = model((images, None))
    except InputError:
        raise
    except MISFITS as error:
        raise InputError(f"must be a size of images that {settings.name} takes, got {settings.image_size}: "
                         f"{to_line(error)}", key="image_size") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, settings.num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"must be a classifier with logits (images, {settings.num_classes}), {settings.name} returns "
                         f"{found}", key="name")
    gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    for weight, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            weight.requires_grad_(False)
    model.train(was_training)


def to_normalization(mean: Any, std: Any) -> Normalization | None:
    """A normalization of three numbers each; None if a library gives none."""
    try:
        return Normalization(tuple(map(float, mean)), tuple(map(float, std)))
    except TypeError:
        return None


def read_patch_size(value: Any) -> int | None:
    """One number for a square patch, from a number or a pair; None if it is neither."""
    values = {value} if isinstance(value, int) else set(value) if isinstance(value, tuple | list) else set()
    return values.pop() if len(values) == 1 else None

