"""The digits: lossless, written once whatever happens, and refused where they cannot be."""

import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
from streaming import StreamingDataset
from support.sources import EXACT, build, read_inputs

from pss_composer.data.sources import digits
from pss_composer.data.sources.digits import prepare_digits, write_images
from pss_composer.errors import InputError


def test_digits_are_all_there_and_lossless(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    specs = [build("digits", tmp_path / "deep" / "digits", split, image_size=8, batch_size=1, augmentation=EXACT)
             for split in ("train", "val")]
    assert [spec.num_samples for spec in specs] == [1437, 360]
    for spec, is_held_out in zip(specs, (False, True), strict=True):
        chosen = (np.arange(1797) % 5 == 0) == is_held_out
        pairs = [(tuple((16 * images[0, 0]).round().int().flatten().tolist()), int(labels))
                 for images, labels in read_inputs(spec)]
        expected = zip(digits.images[chosen].reshape(-1, 64).astype(int), digits.target[chosen], strict=True)
        assert sorted(pairs) == sorted((tuple(pixels.tolist()), int(label)) for pixels, label in expected)


def test_digits_are_written_once_by_many_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare_digits, args=(tmp_path / "digits",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert os.listdir(tmp_path) == ["digits"]
    before = (tmp_path / "digits" / "val" / "index.json").stat()
    prepare_digits(tmp_path / "digits")
    assert (tmp_path / "digits" / "val" / "index.json").stat() == before


def test_second_local_rank_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("fork")

    def wait():
        os.environ["LOCAL_RANK"] = "1"
        prepare_digits(tmp_path / "digits")

    waiting = context.Process(target=wait)
    waiting.start()
    waiting.join(0.3)
    assert waiting.exitcode is None and os.listdir(tmp_path) == []
    prepare_digits(tmp_path / "digits")
    waiting.join(10)
    assert waiting.exitcode == 0


def test_digits_of_a_killed_run_are_written_again(tmp_path, monkeypatch):
    def die_at_the_second_split(folder, images, labels):
        if folder.name == "val":
            os.kill(os.getpid(), signal.SIGKILL)
        write_images(folder, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(digits, "write_images", die_at_the_second_split)
        process = multiprocessing.get_context("fork").Process(target=prepare_digits, args=(tmp_path / "digits",))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "digits").exists()
    prepare_digits(tmp_path / "digits")
    assert StreamingDataset(local=str(tmp_path / "digits" / "val"), batch_size=1).size == 360


# bad input


def assert_input_error(match, path, **options):
    with pytest.raises(InputError, match=match) as error:
        build("digits", path, **options)
    assert "\n" not in str(error.value)


def test_bad_digits(tmp_path, monkeypatch):
    assert_input_error("^path must be a folder, got None", None)
    assert_input_error("^num_classes must be at least 10 for digits, got 9", tmp_path, num_classes=9)
    (tmp_path / "thesis.tex").touch()
    assert_input_error("^path must be a new or empty folder, or hold the digits, got '", tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    match = "^name must not be digits without scikit-learn: pip install scikit-learn$"
    assert_input_error(match, tmp_path / "digits")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    assert_input_error("^path must be a folder that can be written, got '/proc/digits': ", "/proc/digits")
    (tmp_path / "file").touch()
    assert_input_error("^path must be a folder that can be written, got '.*/file/digits': File exists$",
                       tmp_path / "file" / "digits")

    def fill_the_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits, "write_images", fill_the_disk)
    assert_input_error("^path must be a folder that can be written, got '.*digits': No space left on device$",
                       tmp_path / "digits")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
