"""Folders of shards: what Composer wrote is read, what is hostile or broken is refused."""

import pickle
import re
import shutil

import pytest
from safetensors.torch import load_file
from support.checkpoint_checks import assert_same, load_into_timm, refuse
from support.checkpoint_files import BUILD
from support.checkpoint_runs import append_entry, to_bytes, train_sharded
from support.hostile import CALLS

from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.transfer import load_checkpoint, load_pretrained


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run with sharded checkpoints, and its moving averages."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, train_sharded(folder)


@pytest.fixture
def copy(sharded, tmp_path):
    """A copy of the last checkpoint."""
    return shutil.copytree(sharded[0] / "ep0-ba3", tmp_path / "shards")


@pytest.mark.parametrize("source", ["", "latest-rank0.pt", "ep0-ba3"])
def test_shards(sharded, out, source):
    folder, expected = sharded
    assert "its moving averages" in export_weights(folder / source, out, ema=True)
    assert_same(load_file(out), {name.removeprefix("module."): weight for name, weight in expected.items()})
    load_into_timm(out)
    for load in (load_pretrained, load_checkpoint):
        model = BUILD["simmim"]()
        load(model, folder / (source or "latest-rank0.pt"))
        assert_same(model.state_dict(), expected)


@pytest.mark.parametrize("place", ["metadata", "planner_data", "state.algorithms", "state.model.module.cls_token"])
def test_hostile_shards_do_nothing(copy, tmp_path, out, place):
    marker = tmp_path / "marker"
    hostile = CALLS["posix.system"](marker)
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    if place.startswith("state."):
        index, info = next(item for item in metadata.storage_data.items() if item[0].fqn == place)
        content = to_bytes([("EMA", hostile)])
        metadata.storage_data[index] = append_entry(copy / info.relative_path, content, info)
    else:
        metadata.planner_data["extra"] = hostile
    (copy / ".metadata").write_bytes(pickle.dumps(hostile if place == "metadata" else metadata))
    message = refuse(export_weights, copy, out)
    assert "asks for posix.system: refused, and nothing of it was run" in message
    assert not marker.exists() and not list(out.parent.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 2])


@pytest.mark.parametrize(("change", "message"), [
    (lambda copy: truncate(copy / ".metadata"), "must be a whole folder of shards"),
    (lambda copy: truncate(copy / "__0_0.distcp"), "must be a whole folder of shards"),
    (lambda copy: (copy / "__1_0.distcp").unlink(), "must be a whole folder of shards, .*__1_0.distcp"),
    (lambda copy: (copy / ".metadata").unlink(), "must be a file, a folder of shards with a .metadata"),
    (lambda copy: (copy / ".metadata").write_bytes(b""), "must be a whole folder of shards"),
    (lambda copy: (copy / ".metadata").write_bytes(pickle.dumps({})), "must be a whole folder of shards"),
])
def test_broken_shards(copy, out, change, message):
    change(copy)
    assert re.search(message, refuse(export_weights, copy, out))
    assert not list(out.parent.iterdir())
