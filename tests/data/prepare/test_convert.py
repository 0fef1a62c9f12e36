"""Conversion to MDS shards: their bytes and labels, images that do not decode, bad input."""

import errno
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming.base.hashing import get_hash
from support.conversion import (
    CLASSES,
    SHARD_SIZE,
    contents,
    convert,
    encode,
    files_of,
    random_image,
    read_back,
    running,
    truncate,
    wait_for_records,
)

from pss_composer.cli import main
from pss_composer.data.prepare.check import check_data
from pss_composer.data.prepare.convert import convert_images
from pss_composer.errors import InputError

# what is written


def test_validation_images_are_read_back_in_order(source, converted):
    assert read_back(converted / "val") == files_of(source, "val")
    assert json.loads((converted / "val" / "classes.json").read_text()) == CLASSES


def test_training_images_are_read_back_shuffled(source, converted):
    images = read_back(converted / "train")
    expected = files_of(source, "train")
    assert sorted(images) == sorted(expected) and images != expected
    order = list(range(len(expected)))
    random.Random(0).shuffle(order)
    assert images == [expected[index] for index in order]


def test_shards_follow_the_sizes_of_the_files(source, converted):
    index = json.loads((converted / "val" / "index.json").read_text())
    sizes = [len(data) for data, _ in files_of(source, "val")]
    assert index["version"] == 2 and len(index["shards"]) > 2
    start = 0
    for number, shard in enumerate(index["shards"]):
        own = sizes[start:start + shard["samples"]]
        start += shard["samples"]
        # as many as fit, and one more would not
        assert sum(own) <= 6 * 1024 < sum(own) + (sizes[start] if start < len(sizes) else 6 * 1024)
        data = (converted / "val" / f"shard.{number:05}.mds").read_bytes()
        hashes = {"xxh3_64": get_hash("xxh3_64", data)}
        assert shard["raw_data"] == {"basename": f"shard.{number:05}.mds", "bytes": len(data), "hashes": hashes}
        assert shard["column_encodings"] == ["jpeg", "int"]
    assert start == len(sizes)


def test_workers_do_not_matter(source, converted, tmp_path):
    convert(source, tmp_path / "out", num_workers=3)
    assert contents(tmp_path / "out") == contents(converted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_command_line_prints_a_line_per_split(source, tmp_path, capsys):
    main(["convert", str(source), str(tmp_path / "out"), "--workers", "2"])
    train, val = capsys.readouterr().out.splitlines()
    assert train == "train: 24 images of 3 classes in 1 shard, 0 left out"
    assert val == "val: 9 images of 3 classes in 1 shard, 0 left out"


def test_large_images_are_resized_and_the_rest_is_untouched(tmp_path):
    rng = np.random.default_rng(1)
    images = {"a": random_image(rng, (40, 60)), "b": random_image(rng, (20, 60)), "c": random_image(rng, (61, 33))}
    files = {name: encode(image) for name, image in images.items()}
    folder = tmp_path / "source" / "train" / "class"
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / f"{name}.jpg").write_bytes(data)
    convert(tmp_path / "source", tmp_path / "out", shortest_side=20, quality=70)

    def resize(data, size):
        return encode(Image.open(io.BytesIO(data)).resize(size, Image.Resampling.BICUBIC), quality=70)

    expected = [resize(files["a"], (30, 20)), files["b"], resize(files["c"], (20, 36))]
    assert sorted(data for data, _ in read_back(tmp_path / "out" / "train")) == sorted(expected)


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "WEBP"])
def test_other_formats_in_disguise_are_untouched(suffix, copied, tmp_path):
    data = encode(random_image(np.random.default_rng(2)), suffix)
    (copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").write_bytes(data)
    convert(copied, tmp_path / "out")
    assert read_back(tmp_path / "out" / "val")[0] == (data, 0)


def test_other_files_are_ignored_and_counted(copied, converted, tmp_path, capsys):
    (copied / "val" / "README").write_text("hello")
    (copied / "val" / CLASSES[0] / "notes.txt").write_text("hello")
    convert(copied, tmp_path / "out")
    assert "val: 2 other files and folders ignored" in capsys.readouterr().out
    assert (tmp_path / "out/val/index.json").read_bytes() == (converted / "val/index.json").read_bytes()


# images that do not decode


def test_truncated_images_are_left_out_and_listed(copied, tmp_path, capsys):
    bad = [copied / "val" / CLASSES[1] / f"{CLASSES[1]}_{index}.JPEG" for index in (0, 2)]
    truncate(bad[0])
    bad[1].write_bytes(b"")
    convert(copied, tmp_path / "out")
    *_, first, second, summary = capsys.readouterr().out.splitlines()
    assert first == f"left out: {bad[0]}: Image is incomplete or truncated"
    assert second.startswith(f"left out: {bad[1]}: cannot identify image file")
    assert summary.startswith("val: 7 images of 3 classes in ") and summary.endswith(" shards, 2 left out")
    expected = [image for index, image in enumerate(files_of(copied, "val")) if index not in (3, 5)]
    assert read_back(tmp_path / "out" / "val") == expected


def test_strict_fails_on_a_bad_image_then_and_later(copied, tmp_path, capsys):
    bad = copied / "train" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    truncate(bad)
    arguments = ["convert", str(copied), str(tmp_path / "out"), "--workers", "1", "--shard-size", SHARD_SIZE]
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--strict"])
    message = f"error: --strict allows only images that decode, got {bad}: Image is incomplete or truncated"
    assert error.value.code == message
    # stopped before the end, without --strict, the record of the shard knows
    with running(*arguments) as process:
        wait_for_records(tmp_path / "out" / "val", 1)
        os.killpg(process.pid, signal.SIGKILL)
    (tmp_path / "out" / "train" / "index.json").unlink()
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--strict"])
    assert error.value.code == message
    main(arguments)
    assert f"left out: {bad}: Image" in capsys.readouterr().out


def test_a_shard_of_bad_images_alone_is_not_there(copied, tmp_path, capsys):
    for path in (copied / "val" / CLASSES[1]).iterdir():
        truncate(path)
    convert(copied, tmp_path / "out", shard_size=1)  # a shard per image
    assert capsys.readouterr().out.splitlines()[-1] == "val: 6 images of 3 classes in 6 shards, 3 left out"
    expected = files_of(copied, "val")
    assert read_back(tmp_path / "out" / "val") == expected[:3] + expected[6:]
    assert check_data(str(tmp_path / "out")) == 0


def test_no_image_that_decodes_is_an_error(tmp_path):
    (tmp_path / "source/val/class").mkdir(parents=True)
    (tmp_path / "source/val/class/a.JPEG").write_bytes(b"hello")
    with pytest.raises(InputError, match="^source must hold images that decode, got none in val; class/a.JPEG: cannot"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out/val/index.json").exists()


# bad input


def test_out_must_not_hold_anything_else(source, converted, tmp_path):
    def expect(message, **options):
        before = contents(out)
        with pytest.raises(InputError, match=message):
            convert(source, out, **options)
        assert contents(out) == before

    out = Path(shutil.copytree(converted, tmp_path / "out"))
    for options in ({"shard_size": "8kb"}, {"shortest_side": 10}):
        expect("^out must be new or hold this conversion, got train/plan.json of another one", **options)
    (out / "notes.txt").write_text("hello")
    expect("^out must hold nothing but train and val, got 'notes.txt' at")
    (out / "notes.txt").unlink()
    (out / "val" / "notes.txt").write_text("hello")
    expect("^out must be new or hold this conversion, got a foreign val/notes.txt")
    (out / "val" / "notes.txt").unlink()
    (out / "val" / "plan.json").unlink()
    expect("^out must be new or hold this conversion, got a foreign val/classes.json")
    out = tmp_path / "file"
    out.write_text("hello")
    expect("^out must be a folder, got")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shortest-side", "0"], "--shortest-side must be at least 1 pixel, got 0"),
        (["--quality", "101"], "--quality must be in [1, 100], got 101"),
        (["--shard-size", "much"], "--shard-size must be a size like 64mb, in [1, 1gb], got 'much'"),
        (["--shard-size", "4gb"], "--shard-size must be a size like 64mb, in [1, 1gb], got '4gb'"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(arguments, message, source, tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["convert", str(source), str(tmp_path / "out"), *arguments])
    assert error.value.code == f"error: {message}"


def test_folders_that_are_no_images_of_classes(copied, converted, tmp_path):
    def expect(message, source=copied, out=tmp_path / "out"):
        with pytest.raises(InputError, match=message):
            convert(source, out)

    expect("^source must be a folder, got", tmp_path / "nowhere")
    expect("^source must hold a folder train or val, or be a flat folder", copied / "val")
    (copied / "val" / "n03").mkdir()
    expect("^source must hold images of every class, got none in")
    shutil.copy(copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", copied / "val" / "n03")
    expect("^source must hold the same class folders in every split, got 1 .* one of two has, like 'n03', in '.*val'")
    shutil.rmtree(copied / "train")
    (tmp_path / "only-train").mkdir()
    shutil.copytree(converted / "train", tmp_path / "only-train" / "train")
    expect("^source must hold the same class folders in every split", out=tmp_path / "only-train")
    shutil.rmtree(copied / "val")
    (copied / "val").mkdir()
    expect("^source must hold a folder per class in every split, got none in")


def test_settings_out_of_range_are_reported_together(source, tmp_path):
    with pytest.raises(InputError) as error:
        convert(source, tmp_path / "out", quality=0, shard_size="4gb", num_workers=0)
    assert str(error.value).splitlines() == [
        "quality must be in [1, 100], got 0", "shard_size must be a size like 64mb, in [1, 1gb], got '4gb'",
        "num_workers must be at least 1, got 0",
    ]


def test_files_and_folders_that_cannot_be_read(copied, tmp_path, monkeypatch):
    """As root everything is readable, so links that lead nowhere and a replaced function take the place of rights."""
    def expect(message):
        with pytest.raises(InputError) as error:
            convert(copied, tmp_path / "out")
        assert str(error.value) == message

    loop = copied / "val" / CLASSES[1] / "loop.JPEG"
    for path in (loop, copied / "val" / "n03"):
        path.symlink_to(path.name)
        expect(f"source must be readable, got {str(path)!r}: {os.strerror(errno.ELOOP)}")
        path.unlink()

    scandir = os.scandir
    refused = copied / "val" / CLASSES[1]

    def scan_or_refuse(path):
        if path == refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scan_or_refuse)
        expect(f"source must be readable, got {str(refused)!r}: Permission denied")
    assert not (tmp_path / "out").exists()

    image = copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    read_bytes = Path.read_bytes

    def read_or_refuse(path):
        if path == image:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_or_refuse)
    expect(f"source must be readable, got {str(image)!r}: Permission denied")


def test_an_image_that_changes_meanwhile_is_an_error(copied, tmp_path, monkeypatch):
    plan_shards = convert_images.__globals__["plan_shards"]

    def plan_and_change(split, shard_size):
        truncate(copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG")
        return plan_shards(split, shard_size)

    shutil.rmtree(copied / "train")
    monkeypatch.setitem(convert_images.__globals__, "plan_shards", plan_and_change)
    with pytest.raises(InputError, match="^source must stay as it is, got .* bytes instead of "):
        convert(copied, tmp_path / "out")
