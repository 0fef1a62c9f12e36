"""check-data: what the shards hold, and every problem by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter
from support.conversion import edit_index, files_of, flip, rewrite

from pss_composer.cli import main
from pss_composer.data.prepare.check import check_data
from pss_composer.errors import InputError


@pytest.fixture
def data(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "data"))


def check_and_read(capsys, path, *arguments):
    """The lines of the command, and its exit status."""
    try:
        main(["check-data", str(path), *arguments])
        code = 0
    except SystemExit as error:
        code = error.code
    return capsys.readouterr().out.splitlines(), code


def test_check_describes_the_splits(data, capsys):
    index = json.loads((data / "val/index.json").read_text())
    num_bytes = sum(path.stat().st_size for path in (data / "val").glob("*.mds"))
    lines, code = check_and_read(capsys, data)
    assert lines[0].startswith("train: 24 images of 3 classes (from 8 of n01440764 to 8 of n01440764), in ")
    description = "9 images of 3 classes (from 3 of n01440764 to 3 of n01440764), in "
    assert lines[1:] == [f"val: {description}{len(index['shards'])} shards, {num_bytes:,} bytes", "no problems"]
    assert code == 0
    (data / "val" / "classes.json").unlink()
    lines, code = check_and_read(capsys, data / "val")
    assert lines[0].startswith("val: 9 images of 3 classes (from 3 of 0 to 3 of 0), in ") and code == 0


def test_check_finds_broken_files(data, capsys):
    train = data / "train"
    contents = {number: (train / f"shard.{number:05}.mds").read_bytes() for number in range(3)}
    (train / "shard.00000.mds").write_bytes(flip(contents[0], 500))
    (train / "shard.00001.mds").write_bytes(contents[1][:-1])
    (train / "shard.00002.mds").unlink()
    (_, first, second, third, _, last), code = check_and_read(capsys, data)
    assert first.startswith("train: shard.00000.mds: must have the xxh3_64 hash ")
    size = len(contents[1])
    assert second == f"train: shard.00001.mds: must have {size} bytes, got {size - 1}"
    assert third == "train: shard.00002.mds: must be there, but is missing"
    assert last == "3 problems" and code == 1


def test_check_finds_wrong_labels(data, capsys):
    shard = (data / "val/shard.00001.mds").read_bytes()
    rewrite(data / "val", 1, shard[:-8] + np.int64(3).tobytes())
    index = json.loads((data / "val/index.json").read_text())
    last_sample = index["shards"][1]["samples"] - 1
    (_, _, problem, last), code = check_and_read(capsys, data)
    assert problem == f"val: shard.00001.mds sample {last_sample}: label must be in [0, 3), got 3"
    assert last == "1 problem" and code == 1


def test_check_decodes_a_sample_of_every_shard(data, capsys):
    shard = (data / "val/shard.00000.mds").read_bytes()
    begin, end = np.frombuffer(shard, np.uint32, 2, offset=4)
    rewrite(data / "val", 0, shard[:begin + 4] + bytes(end - begin - 12) + shard[end - 8:])
    (_, _, problem, _), code = check_and_read(capsys, data)
    assert problem.startswith("val: shard.00000.mds sample 0: cannot identify image file") and code == 1
    assert check_and_read(capsys, data, "--samples-per-shard", "0")[1] == 0


def test_check_finds_shards_that_do_not_fit_the_index(data, capsys):
    shard = (data / "val/shard.00000.mds").read_bytes()
    (num_samples,) = np.frombuffer(shard, np.uint32, 1)
    edit_index(data / "val", lambda shards: shards[0].update(samples=int(num_samples) + 1))
    lines, code = check_and_read(capsys, data / "val")
    expected = f"must hold the {num_samples + 1} samples of index.json, got {num_samples}"
    assert lines[1:] == [f"val: shard.00000.mds: {expected}", "1 problem"] and code == 1
    edit_index(data / "val", lambda shards: shards[0].update(samples=int(num_samples)))
    header = bytearray(shard)
    header[8:12] = np.uint32(2**31).tobytes()
    rewrite(data / "val", 0, bytes(header))
    lines, _ = check_and_read(capsys, data / "val")
    assert lines[1] == "val: shard.00000.mds: must be MDS, but its samples overlap or end elsewhere than the file"
    (data / "val/index.json").write_text('{"version": 2, "shards": [{}]}')
    lines, code = check_and_read(capsys, data / "val")
    assert lines[0].startswith("val: index.json: must be the index of MDS shards") and code == 1


def test_check_needs_a_finished_split(tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["check-data", str(tmp_path)])
    assert error.value.code == f"error: PATH must hold an index.json, or one in train or val, got none at {tmp_path}"
    with pytest.raises(InputError, match="^samples_per_shard must be at least 0, got -1"):
        check_data(str(tmp_path), samples_per_shard=-1)


def test_check_reads_shards_that_are_packed(source, tmp_path, capsys):
    images = files_of(source, "val")
    with MDSWriter(out=str(tmp_path / "val"), columns={"x": "jpeg", "y": "int"}, compression="zstd",
                   hashes=["sha1"]) as writer:
        for data, label in images:
            writer.write({"x": data, "y": label})
    lines, code = check_and_read(capsys, tmp_path)
    assert lines[0].startswith("val: 9 images of 3 classes (from 3 of 0 to 3 of 0), in 1 shards, ") and code == 0
    (packed,) = (tmp_path / "val").glob("*.zstd")
    packed.write_bytes(flip(packed.read_bytes(), 100))
    lines, code = check_and_read(capsys, tmp_path)
    assert lines[1].startswith(f"val: {packed.name}: must have the sha1 hash ") and code == 1


def test_check_runs_no_code_from_shards(tmp_path, capsys):
    with MDSWriter(out=str(tmp_path / "val"), columns={"x": "pkl", "y": "int"}) as writer:
        writer.write({"x": Trap(), "y": 0})
    (line, last), code = check_and_read(capsys, tmp_path)
    assert line.startswith("val: index.json: must be the index of MDS shards, got a broken one (Column x contains an ")
    assert last == "1 problem" and code == 1


class Trap:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(("key", "value"), [("column_sizes", [None, 4]), ("column_sizes", [4, 8])])
def test_check_finds_columns_that_do_not_fit(key, value, data, capsys):
    edit_index(data / "val", lambda shards: shards[0].update({key: value}))
    lines, code = check_and_read(capsys, data / "val")
    assert lines[1].startswith("val: shard.00000.mds: must be MDS, ") and lines[2] == "1 problem" and code == 1


def test_check_finds_shards_that_do_not_unpack(tmp_path, capsys):
    with MDSWriter(out=str(tmp_path / "val"), columns={"x": "jpeg", "y": "int"}, compression="zstd") as writer:
        writer.write({"x": b"", "y": 0})
    (packed,) = (tmp_path / "val").glob("*.zstd")
    packed.write_bytes(flip(packed.read_bytes(), 0))
    lines, code = check_and_read(capsys, tmp_path)
    assert lines[1].startswith(f"val: {packed.name}: Input data invalid ") and code == 1
