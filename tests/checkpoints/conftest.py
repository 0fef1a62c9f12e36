"""Files and runs that several tests of checkpoints read."""

import pytest
from support.checkpoint_files import PUBLISHED, save
from support.checkpoint_runs import train


@pytest.fixture
def out(tmp_path):
    """Where a function writes; nothing else may be in this folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "vit.safetensors"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A name -> the published file of that name."""
    folder = tmp_path_factory.mktemp("published")
    return {name: save(build(), folder / f"{name}.pth") for name, build in PUBLISHED.items()}


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run under EMA that stopped within an epoch, after three batches; a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, stop_at=3)
    return folder
