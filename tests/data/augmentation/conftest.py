"""The pictures that the tests of the augmentation share."""

import pytest
from PIL import Image
from support.pictures import load_photographs


@pytest.fixture(scope="session")
def photographs():
    """Six colour photographs, 500 by 375."""
    return load_photographs()


@pytest.fixture(scope="session")
def thumbnails(photographs):
    """The same, 48 by 36."""
    return [image.resize((48, 36), Image.Resampling.LANCZOS) for image in photographs]
