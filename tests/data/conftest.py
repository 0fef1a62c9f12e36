"""Small data for every source."""

import pytest
from support.sources import write_folder, write_mnist, write_shards


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """A folder for every source that reads one; None for the others."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "folder")
    write_shards(root / "streaming")
    write_mnist(root / "torchvision")
    return {"folder": root / "folder", "streaming": root / "streaming", "torchvision": root / "torchvision",
            "synthetic": None}
