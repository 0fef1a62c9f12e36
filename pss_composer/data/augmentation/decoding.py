"""From the bytes of a picture to its pixels."""

from __future__ import annotations

import io

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from pss_composer.errors import to_line


class BadImage(ValueError):
    """A picture that does not decode; one line with the decoder's reason."""


def decode_tensor(data: bytes) -> Tensor:
    """The pixels of a picture as RGB: torchvision decodes a JPEG, PIL any other format.

    Both call libjpeg-turbo in the same way, so that the pixels are those of PIL, bit for bit.

    Args:
        data: A whole file.

    Returns:
        uint8 (3, H, W); for a JPEG in the memory format `torch.channels_last`.

    Raises:
        BadImage: The bytes do not decode.
    """
    if not data.startswith(b"\xff\xd8"):
        return pil_to_tensor(decode_pil(data))
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise BadImage(to_line(error)) from None


def decode_pil(data: bytes) -> Image.Image:
    """The same as a PIL image in mode RGB.

    Raises:
        BadImage: The bytes do not decode.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError:  # its message holds a memory address
        raise BadImage("cannot identify image file") from None
    except Exception as error:  # PIL's decoders raise exceptions of many classes for broken files
        raise BadImage(to_line(error)) from None
