"""Conversion to MDS shards: bytes and labels, stops and crashes, bad images, labels in files, remotes; check-data."""

import contextlib
import csv
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from support.servers import s3_server, sftp_server
from sklearn.datasets import load_sample_images
from streaming.base.hashing import get_hash
from streaming.vision import StreamingImageNet

from pss_composer.__main__ import main
from pss_composer.data import shards, stores
from pss_composer.data.prepare.check import check_data
from pss_composer.data.prepare.convert import convert_images
from pss_composer.data.mds.shared_memory import free_when_dropped, taking_a_number
from pss_composer.errors import InputError

CLASSES = ["n01440764", "n01443537", "n02102040"]
NUM_IMAGES = {"train": 8, "val": 3}  # per class
SHARD_SIZE = "6kb"
WAIT = 20  # seconds


def encode(image, suffix="JPEG", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def random_image(rng, size=(24, 18)):
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Small images of noise and two photographs."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(image).resize((64, 48)) for image in load_sample_images().images]
    for split, num_images in NUM_IMAGES.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for index in range(num_images):
                image = photographs[index] if index < len(photographs) else random_image(rng)
                (root / split / name / f"{name}_{index}.JPEG").write_bytes(encode(image, quality=80 + index))
    return root


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """What all conversions of `source` must give; most tests compare with it."""
    out = tmp_path_factory.mktemp("converted")
    convert(source, out, num_workers=1)
    return out


@pytest.fixture
def copied(source, tmp_path):
    """Images that a test may change."""
    return Path(shutil.copytree(source, tmp_path / "copied"))


def convert(source, out, **options):
    convert_images(Path(source), str(out), **({"shard_size": SHARD_SIZE, "num_workers": 2} | options))


def files_of(source, split):
    """Bytes and label of every image, in the order of the names."""
    return [
        (path.read_bytes(), label)
        for label, name in enumerate(CLASSES)
        for path in sorted((source / split / name).iterdir())
    ]


def read_back(folder, **options):
    """Bytes and label of every image, as streaming reads them."""
    with taking_a_number():
        dataset = StreamingImageNet(
            local=str(folder), batch_size=1, transform=lambda image: image.fp.getvalue(), **options
        )
    free_when_dropped(dataset)
    return [dataset[index] for index in range(len(dataset))]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("shard.*.mds")}


@contextlib.contextmanager
def running(*arguments):
    """The command line in a process and process group of its own, whose images take their time."""

    def run():
        os.setsid()
        read_image = shards._read_image

        def read_slowly(*arguments):
            time.sleep(0.05)
            return read_image(*arguments)

        shards._read_image = read_slowly
        main([str(argument) for argument in arguments])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def wait_for_files(folder, pattern, count):
    deadline = time.monotonic() + WAIT
    while len(list(Path(folder).rglob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {count} files {pattern} in {WAIT} s"
        time.sleep(0.01)


def find_workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))


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


# stops


def test_a_killed_conversion_goes_on(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_files(out / "train", "shard.*.json", 2)
        os.killpg(process.pid, signal.SIGKILL)
    done = times(out)
    assert done and not (out / "train" / "index.json").exists()
    convert(source, out)
    assert contents(out) == contents(converted)
    recorded = [path for path in done if times(out)[path] == done[path]]
    assert len(recorded) >= 2


def test_workers_end_with_their_parent(source, tmp_path):
    with running("convert", source, tmp_path / "out", "--shard-size", SHARD_SIZE, "--workers", 3) as process:
        wait_for_files(tmp_path / "out", "shard.*.json", 1)
        workers = find_workers(process)
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
                  for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(workers) == 3


def test_two_conversions_do_not_write_at_once(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 1) as process:
        wait_for_files(out / "train", "shard.*.json", 1)
        os.kill(process.pid, signal.SIGSTOP)  # else it may be at its end before the second one gives up
        with pytest.raises(InputError, match="OUT must be written by one conversion at a time.*train"):
            convert(source, out)
        os.kill(process.pid, signal.SIGCONT)
        process.join(WAIT)
        assert process.exitcode == 0
    assert contents(out) == contents(converted)


def test_a_file_system_without_locks_is_none_the_worse(source, converted, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(converted)


def test_a_broken_record_or_shard_is_written_again(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 1) as process:
        wait_for_files(out / "train", "shard.*.json", 4)
        os.killpg(process.pid, signal.SIGKILL)
    (out / "train" / ".parts" / "shard.00000.json").write_text("")
    (out / "train" / "shard.00001.mds").write_bytes(b"short")
    (out / "train" / "shard.00002.mds").unlink()
    convert(source, out)
    assert contents(out) == contents(converted)


def test_ctrl_c_stops_with_a_line(source, converted, tmp_path, capfd):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_files(out / "train", "shard.*.json", 1)
        os.killpg(process.pid, signal.SIGINT)
        process.join(WAIT)
        assert process.exitcode == 130
    assert capfd.readouterr().err == "stopped: the same command goes on from here\n"
    convert(source, out)
    assert contents(out) == contents(converted)


def test_a_worker_that_dies_ends_the_conversion_with_a_line(source, tmp_path, capfd):
    with running("convert", source, tmp_path / "out", "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_files(tmp_path / "out", "shard.*.json", 1)
        os.kill(find_workers(process)[0], signal.SIGKILL)
        process.join(WAIT)
        assert process.exitcode == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: a worker process of --workers 2 died")


def test_a_finished_conversion_is_left_alone(source, converted, tmp_path, capsys):
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert capsys.readouterr().out.splitlines() == [
        "train: finished already, nothing to do", "val: finished already, nothing to do"
    ]


# images that do not decode


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


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
    message = f"error: --strict: SRC must hold whole images, got {bad}: Image is incomplete or truncated"
    assert error.value.code == message
    # stopped before the end, without --strict, the record of the shard knows
    with running(*arguments) as process:
        wait_for_files(tmp_path / "out" / "val", "shard.*.json", 1)
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
    with pytest.raises(InputError, match="SRC must hold images that decode, got none in val; class/a.JPEG: cannot"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out/val/index.json").exists()


# validation images without class folders


LABELS = [2, 0, 1, 2]


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index in range(len(LABELS)):
        (folder / f"ILSVRC2012_val_{index + 1:08}.JPEG").write_bytes(encode(random_image(rng)))
    return folder


def write_meta(path):
    """As in the development kit: numbers are not in the order of the ids, and inner nodes have children."""
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", object), ("words", object), ("gloss", object), ("num_children", "f8")]
    rows = [(7, CLASSES[2], "a dog", "", 0), (1, CLASSES[0], "tench", "", 0), (3, CLASSES[1], "goldfish", "", 0),
            (1001, "n00001740", "entity", "", 3)]
    scipy.io.savemat(path, {"synsets": np.array(rows, dtype=fields)})


def write_truth(form, folder):
    folder.mkdir(exist_ok=True)
    if form == "kit":
        write_meta(folder / "meta.mat")
        numbers = {0: 1, 1: 3, 2: 7}
        path = folder / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text("".join(f"{numbers[label]}\n" for label in LABELS))
    elif form == "ids":
        path = folder / "ids.txt"
        path.write_text("\n".join(CLASSES[label] for label in LABELS))
    else:
        path = folder / "LOC_val_solution.csv"
        with path.open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageId", "PredictionString"])
            for index, label in reversed(list(enumerate(LABELS))):
                box = f"{CLASSES[label]} 1 2 30 40 "
                rows.writerow([f"ILSVRC2012_val_{index + 1:08}", box * (1 + index % 2)])
    return path


@pytest.mark.parametrize("form", ["kit", "ids", "csv"])
def test_ground_truth(form, flat, tmp_path):
    main(["convert", str(flat), str(tmp_path / "out"), "--ground-truth", str(write_truth(form, tmp_path / "truth"))])
    images = [path.read_bytes() for path in sorted(flat.iterdir())]
    assert read_back(tmp_path / "out" / "val") == list(zip(images, LABELS, strict=True))
    assert json.loads((tmp_path / "out" / "val" / "classes.json").read_text()) == CLASSES


def test_ground_truth_has_the_classes_of_the_training_images(flat, source, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copytree(source / "train", tmp_path / "source" / "train")
    more = tmp_path / "source" / "train" / "n00000001"
    shutil.copytree(source / "train" / CLASSES[0], more)
    convert(tmp_path / "source", tmp_path / "out")
    truth = write_truth("ids", tmp_path)
    convert(flat, tmp_path / "out", ground_truth=truth)
    assert [label for _, label in read_back(tmp_path / "out" / "val")] == [label + 1 for label in LABELS]
    assert json.loads((tmp_path / "out" / "val" / "classes.json").read_text()) == ["n00000001", *CLASSES]
    truth.write_text(truth.read_text().replace(CLASSES[1], "n99999999"))
    with pytest.raises(InputError, match="must name classes of the training images in OUT, got 1 others, like n999"):
        convert(flat, tmp_path / "out", ground_truth=truth)


def test_ground_truth_that_does_not_fit(flat, source, tmp_path):
    def expect(message, path, images=flat):
        with pytest.raises(InputError, match=message):
            convert(images, tmp_path / "out", ground_truth=path)

    path = write_truth("ids", tmp_path)
    expect("--ground-truth is for a flat folder of images, got a folder 'train' in SRC", path, source)
    path.write_text(CLASSES[0])
    expect("must have a line per image, got 1 lines for 4 images", path)
    path.write_text("tench\n" * 4)
    expect("or WordNet ids like n01440764, got 'tench' in", path)
    expect("must be a text file, got", tmp_path / "nowhere")
    path.write_text("1\n" * 4)
    expect("needs meta.mat beside it, got none at", path)
    (tmp_path / "meta.mat").write_text("hello")
    expect("needs the development kit's meta.mat, got", path)
    write_meta(tmp_path / "meta.mat")
    path.write_text("1\n3\n7\n1001\n")
    expect("must name classes of meta.mat, got 1001 in", path)
    path = write_truth("csv", tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    expect("must name the images of SRC, got 3 names for 4 images; ILSVRC2012_val_00000001 is in one", path)
    path.write_text("ImageId,PredictionString\na\n")
    expect("must have the columns ImageId,PredictionString", path)
    assert not (tmp_path / "out").exists()


# bad input


def test_out_must_not_hold_anything_else(source, converted, tmp_path):
    def expect(message, **options):
        before = contents(out)
        with pytest.raises(InputError, match=message):
            convert(source, out, **options)
        assert contents(out) == before

    out = Path(shutil.copytree(converted, tmp_path / "out"))
    for options in ({"shard_size": "8kb"}, {"shortest_side": 10}):
        expect("OUT must be new or hold this conversion, got train/plan.json of another one", **options)
    (out / "notes.txt").write_text("hello")
    expect("OUT must hold nothing but train and val, got 'notes.txt' at")
    (out / "notes.txt").unlink()
    (out / "val" / "notes.txt").write_text("hello")
    expect("OUT must be new or hold this conversion, got a foreign val/notes.txt")
    (out / "val" / "notes.txt").unlink()
    (out / "val" / "plan.json").unlink()
    expect("OUT must be new or hold this conversion, got a foreign val/classes.json")
    out = tmp_path / "file"
    out.write_text("hello")
    expect("OUT must be a folder, got")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shortest-side", "0"], "--shortest-side must be at least 1 pixel, got 0"),
        (["--quality", "101"], "--quality must be in [1, 100], got 101"),
        (["--shard-size", "much"], "--shard-size must be a number of bytes like 64mb, got 'much'"),
        (["--shard-size", "4gb"], "--shard-size must be in [1, 1gb], got '4gb'"),
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

    expect("SRC must be a folder, got", tmp_path / "nowhere")
    expect("SRC must hold a folder train or val, or be a flat folder", copied / "val")
    (copied / "val" / "n03").mkdir()
    expect("SRC must hold images of every class, got none in")
    shutil.copy(copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", copied / "val" / "n03")
    expect("the same class folders in every split, got 1 that only one of two has, like 'n03', in '.*val'")
    shutil.rmtree(copied / "train")
    (tmp_path / "only-train").mkdir()
    shutil.copytree(converted / "train", tmp_path / "only-train" / "train")
    expect("the same class folders in every split", out=tmp_path / "only-train")
    shutil.rmtree(copied / "val")
    (copied / "val").mkdir()
    expect("SRC must hold a folder per class in every split, got none in")
    expect("a remote must begin with .*, s3://, sftp://, got 'ftp://host/out'", out="ftp://host/out")


def test_an_image_that_changes_meanwhile_is_an_error(copied, tmp_path, monkeypatch):
    plan_shards = convert_images.__globals__["plan_shards"]

    def plan_and_change(split, shard_size):
        truncate(copied / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG")
        return plan_shards(split, shard_size)

    shutil.rmtree(copied / "train")
    monkeypatch.setitem(convert_images.__globals__, "plan_shards", plan_and_change)
    with pytest.raises(InputError, match="SRC must stay as it is, got .* bytes instead of "):
        convert(copied, tmp_path / "out")


# stores that fail


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_full_disk_is_tried_again_and_then_told(num_failures, source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BACKOFFS", (0.01, 0.01))
    put = stores.LocalStore.put
    failures = multiprocessing.RawValue("i", 0)

    def put_or_fail(self, file, name):
        if name == "train/shard.00002.mds" and failures.value < num_failures:
            failures.value += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, file, name)

    monkeypatch.setattr(stores.LocalStore, "put", put_or_fail)
    if num_failures == 3:
        with pytest.raises(InputError, match=r"OUT must take train/shard.00002.mds, got .*No space left.*\(3 attempts"):
            convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")
    assert failures.value == num_failures
    assert contents(tmp_path / "out") == contents(converted)


def test_a_remote_that_does_not_answer(source, monkeypatch):
    monkeypatch.setattr(stores, "BACKOFFS", (0.01,))
    with pytest.raises(InputError) as error:
        convert(source, "sftp://user:secret@127.0.0.1:1/out")
    assert str(error.value).startswith("OUT must be readable at sftp://user:***@127.0.0.1:1/out, got ")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


# remotes


@pytest.fixture(params=["s3", "sftp"])
def remote(request, tmp_path, monkeypatch):
    """A URL and the folder where it leads."""
    served = tmp_path / "served"
    (served / "bucket").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        if request.param == "s3":
            url, environment = "s3://bucket", stack.enter_context(s3_server(served))
        else:
            url, environment = stack.enter_context(sftp_server(served))
            url += "//bucket"
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield f"{url}/deep/out", served / "bucket" / "deep" / "out"


def test_remote(remote, source, converted, tmp_path, capsys):
    url, folder = remote
    with running("convert", source, url, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_files(folder / "train", "shard.*.json", 2)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "train").glob("shard.*.mds")}
    recorded = [path.stem + ".mds" for path in (folder / "train" / ".parts").glob("shard.*.json")]
    assert not (folder / "train" / "index.json").exists()
    convert(source, url)
    for name in recorded:
        assert (folder / "train" / name).stat().st_mtime_ns == done[name]
    assert all(contents(folder)[path] == data for path, data in contents(converted).items())
    convert(source, url)
    assert capsys.readouterr().out.splitlines()[-1] == "val: finished already, nothing to do"

    expected = files_of(source, "val")
    assert read_back(tmp_path / "cache", remote=f"{url}/val") == expected

    assert check_data(url) == 0
    shard = folder / "val" / "shard.00001.mds"
    shard.write_bytes(flip(shard.read_bytes(), -1))
    (folder / "val" / "shard.00002.mds").unlink()
    capsys.readouterr()
    assert check_data(f"{url}/val") == 2
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("val: shard.00001.mds: must have the xxh3_64 hash ")
    assert (second, last) == ("val: shard.00002.mds: must be there, but is missing", "2 problems")

    with pytest.raises(InputError, match="got train/plan.json of another one"):
        convert(source, url, shard_size="1mb")
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="OUT must hold nothing but train and val, got 'notes.txt' at"):
        convert(source, url)


# check-data


def flip(data, position):
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def rewrite(folder, number, data):
    """A shard of other bytes, and the index that fits."""
    (folder / f"shard.{number:05}.mds").write_bytes(data)

    def change(shards):
        shards[number]["raw_data"] |= {"bytes": len(data), "hashes": {"xxh3_64": get_hash("xxh3_64", data)}}

    edit_index(folder, change)


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
    with pytest.raises(InputError, match="--samples-per-shard must be at least 0, got -1"):
        check_data(str(tmp_path), samples_per_shard=-1)
