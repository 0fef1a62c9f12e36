"""Decoding: the pixels of PIL, and one line for bytes that do not decode."""

import io

import pytest
import torch
from PIL import Image
from support.pictures import encode
from torchvision.transforms.v2.functional import pil_to_tensor

from pss_composer.data.augmentation.decoding import BadImage, decode_pil, decode_tensor


@pytest.mark.parametrize(("mode", "format", "options"), [
    ("RGB", "JPEG", {"quality": 90}), ("L", "JPEG", {"quality": 90}), ("CMYK", "JPEG", {"quality": 90}),
    ("RGB", "JPEG", {"quality": 90, "progressive": True}), ("L", "JPEG", {"progressive": True}),
    ("RGB", "JPEG", {"quality": 95, "subsampling": 0}), ("RGB", "JPEG", {"quality": 30, "subsampling": 1}),
    ("RGB", "JPEG", {"keep_rgb": True}), ("RGB", "JPEG", {"restart_marker_blocks": 4}),
    ("RGB", "PNG", {}), ("L", "PNG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {}), ("RGB", "WEBP", {}),
])
def test_decoded_pixels_are_those_of_pil(mode, format, options, photographs):
    for image, size in zip(photographs, [(500, 375), (375, 500), (251, 99), (17, 33), (8, 8), (1, 1)], strict=True):
        data = encode(image.resize(size).convert(mode), format, **options)
        expected = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
        assert expected.shape == (3, *size[::-1])
        for pixels in (decode_tensor(data), pil_to_tensor(decode_pil(data))):
            assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected)


@pytest.mark.parametrize("decode", [decode_tensor, decode_pil])
@pytest.mark.parametrize(("mode", "format", "options"), [
    ("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}),
    ("RGB", "PNG", {}),
])
def test_bytes_that_do_not_decode(mode, format, options, decode, photographs):
    data = encode(photographs[0].resize((100, 75)).convert(mode), format, **options)
    # of a PNG that lacks but its last checksums, all pixels are there
    places = [0, 1, 2, 3, 10, 100, len(data) // 4, len(data) // 2, len(data) - 100]
    places += [len(data) - 20, len(data) - 2, len(data) - 1] * (format == "JPEG")
    garbage = [b"\0" * 1000, data[:2] + bytes(range(256)) * 4, data[4:], b"text\n\nin lines\n"]
    for bad in [data[:place] for place in places] + garbage:
        with pytest.raises(BadImage) as error:
            decode(bad)
        assert str(error.value) and "\n" not in str(error.value)
