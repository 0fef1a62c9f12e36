"""Broken samples and shards: skipped and counted, or one line that names them."""

import io
import re
import time

import pytest
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.storage.download import LocalDownloader
from support.jobs import RECIPE, TIMEOUT, assert_one_line, read_labels, read_metrics, wait_well
from support.launch import launch
from support.shards import (
    ALL,
    NUM_IMAGES,
    STEP,
    assert_each_once,
    break_sample,
    build,
    encode,
    list_samples,
    read,
    read_epoch,
    refuse,
    replace_labels,
    write_source,
)
from torch import nn

from pss_composer.data.loader import Loader
from pss_composer.errors import InputError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_picture_is_one_line(num_workers, copied):
    name = break_sample(copied / "train", 17)
    message = refuse(copied, num_workers=num_workers)
    assert message.startswith(f"{name} must decode, got ") and "truncated" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_picture_in_a_folder_is_one_line(num_workers, tmp_path):
    write_source(tmp_path)
    path = tmp_path / "train" / "c13" / "0.JPEG"
    path.write_bytes(path.read_bytes()[:-50])
    message = refuse(tmp_path, name="folder", num_workers=num_workers)
    assert message.startswith(f"'{path}' must hold an image, got ") and "truncated" in message


def test_train_stops_with_one_line_at_a_truncated_picture(copied, train, tmp_path):
    name = break_sample(copied / "train", 17)
    for num_workers in (0, 2):
        job = train(tmp_path / str(num_workers), f"data.path={copied}", f"data.num_workers={num_workers}")
        assert_one_line(job, f"error: {name} must decode, got ")
        assert not (tmp_path / str(num_workers) / "run").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_bad_samples(num_workers, copied, expected, caplog):
    labels = [label for *_, label in list_samples(copied / "train")]
    # 3 and 4 by 5, the last one by the first
    names = [break_sample(copied / "train", number) for number in (3, 4, NUM_IMAGES - 1)]
    replacements = {labels[3]: labels[5], labels[4]: labels[5], labels[-1]: labels[0]}
    spec = build(copied, on_bad_sample="skip", num_workers=num_workers)
    for epoch in range(2):
        assert read_epoch(spec) == replace_labels(expected[5 * epoch:5 * epoch + 5], replacements)
        assert spec.dataloader.num_skipped == 4 * (epoch + 1)
    spec.dataloader.close()
    messages = [record.getMessage() for record in caplog.records if record.name == Loader.__module__]
    assert all(message.startswith("skipped: sample ") for message in messages)
    assert [sum(name in message for message in messages) for name in names] == [2, 4, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_a_folder_replaces_bad_samples(num_workers, tmp_path):
    write_source(tmp_path)
    batches = []
    for is_broken in (False, True):
        if is_broken:
            (tmp_path / "train" / "c13" / "0.JPEG").write_bytes(b"no picture")
        spec = build(tmp_path, name="folder", on_bad_sample="skip", num_workers=num_workers)
        batches.append(read_epoch(spec))
        spec.dataloader.close()
    assert batches[1] == replace_labels(batches[0], {13: 14}) and spec.dataloader.num_skipped == 1


def test_train_counts_and_logs_what_it_skips(copied, train, tmp_path, straight):
    labels = [label for *_, label in list_samples(copied / "train")]
    names = [break_sample(copied / "train", 3), break_sample(copied / "val", 20)]
    job = train(tmp_path / "run", f"data.path={copied}", "data.num_workers=2", "data.on_bad_sample=skip")
    wait_well(job)
    trained = read_labels(tmp_path / "run")
    assert trained == [sorted(batch) for batch in replace_labels(read_labels(straight), {labels[3]: labels[4]})]
    numbers = [number for number, batch in enumerate(read_labels(straight)) if labels[3] in batch]
    assert read_metrics(tmp_path / "run", "loader/skipped") == [
        sum(number <= batch for number in numbers) for batch in range(10)
    ]
    assert all(job.log.read_text().count(f"skipped: {name} must decode") == 2 for name in names)


class Grey(nn.Module):
    """Knows the number of a picture by its grey value, but for number 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        numbers = (images.mean((1, 2, 3)) * 255 / STEP).round().long().clamp(min=1)
        return nn.functional.one_hot(numbers, NUM_IMAGES).float() + self.weight


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["streaming", "folder"])
@pytest.mark.filterwarnings("ignore:.*optimizer.*:UserWarning")
def test_evaluation_leaves_bad_samples_out(name, num_workers, copied, tmp_path):
    if name == "folder":
        copied = write_source(tmp_path / "source")
        for number in (5, 30):
            (copied / "val" / f"c{number:02}" / "0.JPEG").write_bytes(b"no picture")
    else:
        for number in (5, 30):
            break_sample(copied / "val", number)
    spec = build(copied, "val", name=name, on_bad_sample="skip", num_workers=num_workers)
    trainer = Trainer(model=ComposerClassifier(Grey(), num_classes=NUM_IMAGES), device="cpu", progress_bar=False,
                      optimizers=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    trainer.eval(spec)
    assert trainer.state.eval_metrics["eval"]["MulticlassAccuracy"].compute() == pytest.approx(37 / 38)
    assert spec.dataloader.num_skipped == 2
    trainer.close()
    spec.dataloader.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_is_all_bad_is_one_line(num_workers, copied):
    names = [break_sample(copied / "val", number) for number in range(8, 16)]
    message = refuse(copied, "val", on_bad_sample="skip", num_workers=num_workers)
    assert message.startswith(f"data must hold an image that can be read in every batch, got none: {names[0]} must")
    for number in ALL:
        break_sample(copied / "train", number)
    message = refuse(copied, on_bad_sample="skip", num_workers=num_workers)
    assert message.startswith("data must hold samples that can be read, got 41 bad ones in a row, the last: sample ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_labels_are_one_line(num_workers, copied):
    break_sample(copied / "train", 8, label=2**40)
    assert refuse(copied, num_workers=num_workers) == (
        f"num_classes must fit the labels, which must be in [0, 40), got {2**40}"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("offset", [0, 9, 2**20, 2**32 - 1])
def test_broken_offsets_are_one_line(offset, num_workers, copied):
    path, place, _ = list_samples(copied / "train")[9]
    data = bytearray(path.read_bytes())
    data[4 * (1 + place):4 * (2 + place)] = offset.to_bytes(4, "little")
    path.write_bytes(data)
    message = refuse(copied, num_workers=num_workers)
    assert re.match(rf"sample ({place}|{place - 1}) of {path.name} in '.*' must (be whole|decode), got ", message)
    spec = build(copied, on_bad_sample="skip", num_workers=num_workers)
    assert [len(labels) for labels in read_epoch(spec)] == [8] * 5 and spec.dataloader.num_skipped >= 1
    spec.dataloader.close()


def test_labels_that_are_no_numbers_are_one_line(tmp_path):
    with MDSWriter(out=str(tmp_path / "train"), columns={"x": "jpeg", "y": "str"}) as shards:
        for number in ALL:
            shards.write({"x": Image.open(io.BytesIO(encode(number))), "y": f"c{number}"})
    assert re.match(r"sample \d+ of shard.00000.mds in '.*' must be whole, got \"invalid literal", refuse(tmp_path))


def test_local_shards_must_be_there_and_whole(copied, train, tmp_path):
    path = copied / "train" / "shard.00004.mds"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert refuse(copied) == (
        f"path must hold whole shards, got {len(data) - 1} bytes instead of {len(data)} in '{path}'"
    )
    path.unlink()
    message = f"path must hold every shard of its index.json, got no '{path}'"
    assert refuse(copied) == message
    assert_one_line(train(tmp_path / "run", f"data.path={copied}"), f"error: data.{message}")


def test_a_local_shard_that_goes_is_one_line(copied):
    spec = build(copied)
    (copied / "train" / "shard.00004.mds").unlink()
    with pytest.raises(InputError, match=r"^path must keep shard\.00004\.mds in '.*': In the absence of local"):
        read_epoch(spec)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_with_another_hash_is_one_line_and_is_not_kept(num_workers, bucket, expected, tmp_path):
    url, folder = bucket
    path = folder / "train" / "shard.00004.mds"
    data = path.read_bytes()
    path.write_bytes(data[:-100] + b"?" + data[-99:])
    assert refuse(tmp_path, remote=url, num_workers=num_workers) == (
        f"remote must give shard.00004.mds: got 'another xxh3_64 than that of the index.json' from {url}/train"
    )
    assert not list((tmp_path / "train").glob("shard.00004.mds*"))
    path.write_bytes(data)
    assert read(tmp_path, remote=url, epochs=2, num_workers=num_workers) == expected


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming's
def test_a_packed_shard_that_does_not_unpack_is_one_line_and_is_not_kept(tmp_path):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    with MDSWriter(out=str(remote / "train"), columns={"x": "jpeg", "y": "int"}, compression="zstd", hashes=["sha1"],
                   size_limit=5000) as shards:
        for number in ALL:
            shards.write({"x": Image.open(io.BytesIO(encode(number))), "y": number})
    path = remote / "train" / "shard.00002.mds.zstd"
    data = path.read_bytes()
    path.write_bytes(b"????" + data[4:])
    message = refuse(cache, remote=str(remote))
    assert message.startswith("remote must give shard.00002.mds: got ")
    assert not list((cache / "train").glob("shard.00002.*"))
    path.write_bytes(data)
    assert_each_once(read(cache, remote=str(remote), epochs=2), epochs=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_missing_is_one_line(num_workers, bucket, tmp_path):
    url, folder = bucket
    (folder / "train" / "shard.00004.mds").unlink()
    options = {"remote": url, "num_workers": num_workers, "download_retry": 1}
    spec = build(tmp_path, **options)
    for _ in range(2):  # a loader that has failed stays so, and does not hang
        with pytest.raises(InputError) as error:
            read_epoch(spec)
        message = str(error.value)
        assert message.startswith("remote must give shard.00004.mds: got ") and f"from {url}/train" in message
    spec.dataloader.close()


def test_a_shard_that_is_missing_is_one_line_where_two_workers_wait_for_it(copied, tmp_path, monkeypatch):
    fetch = LocalDownloader._download_file_impl

    def fetch_slowly(self, remote, local, timeout):
        time.sleep(0.2)
        fetch(self, remote, local, timeout)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", fetch_slowly)
    for shard in (0, 3, 7):
        path = copied / "train" / f"shard.0000{shard}.mds"
        path.rename(tmp_path / "shard")
        message = refuse(tmp_path / str(shard), remote=str(copied), num_workers=2, batch_size=1, download_retry=1)
        assert message.startswith(f"remote must give {path.name}: got ")
        (tmp_path / "shard").rename(path)


def test_a_shard_that_is_missing_ends_all_ranks(bucket, s3, tmp_path):
    url, folder = bucket
    (folder / "train" / "shard.00004.mds").unlink()
    arguments = [*RECIPE, f"data.remote={url}", f"data.local={tmp_path}/cache", "data.num_workers=1",
                 "data.download_retry=1", f"save_folder={tmp_path}/run"]
    with pytest.raises(AssertionError) as error:
        launch("train.py", *arguments, log=tmp_path / "log.txt", timeout=TIMEOUT - 10)
    assert "no end within" not in str(error.value)
    output = (tmp_path / "log.txt").read_text()
    assert "error: data.remote must give shard.00004.mds: got " in output and "Traceback" not in output


def test_a_thread_that_fails_does_not_shorten_the_epoch(data, tmp_path, monkeypatch):
    prepare = StreamingDataset.prepare_shard

    def fail_in_threads(self, shard_id, blocking=True):
        if not blocking:
            raise OSError("no locks available")
        prepare(self, shard_id, blocking)

    monkeypatch.setattr(StreamingDataset, "prepare_shard", fail_in_threads)
    spec = build(tmp_path, remote=str(data), batch_size=1)
    with pytest.raises(OSError, match="no locks available"):
        read_epoch(spec)
