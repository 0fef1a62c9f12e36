"""Data sources: shapes, order, what training sees after a resume or with other workers, and bad input."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from composer import Event, Trainer
from composer.models import ComposerClassifier
from composer.utils import reproducibility
from PIL import Image
from pss_composer.data.randomness import EpochSampler, derive_seed, seeded
from streaming import StreamingDataset
from torch import nn

from pss_composer.data import DATA_SOURCES, Augmentation, build_dataspec, restore_generators
from pss_composer.data.samples import Collate
from pss_composer.data.sources.digits import prepare_digits, write_images
from pss_composer.errors import InputError

NUM_IMAGES = 43  # five batches of 8 and a rest
IMAGE_SIZE = 16
MAP_STYLE_OR_NOT = ("synthetic", "folder", "streaming")


def random_images(num_images, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_images, 12, 12, 3), dtype=np.uint8), np.arange(num_images) % 3


def write_folder(path, num_images=NUM_IMAGES):
    for seed, split in enumerate(("train", "val")):
        for index, (image, label) in enumerate(zip(*random_images(num_images, seed), strict=True)):
            (path / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / split / f"class{label}" / f"{index:03}.png")


def write_shards(path, num_images=NUM_IMAGES):
    for seed, split in enumerate(("train", "val")):
        write_images(path / split, *random_images(num_images, seed))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A folder for every source."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "folder")
    write_shards(root / "streaming")
    return {name: str(root / name) for name in DATA_SOURCES}


def build(name, paths, split="train", **options):
    settings = {"image_size": IMAGE_SIZE, "num_classes": 10, "batch_size": 8, "seed": 3, "num_samples": NUM_IMAGES}
    return build_dataspec(name, split=split, path=paths[name], **(settings | options))


def read_batches(spec, epochs=1):
    """The batches of some epochs, as Composer asks for them."""
    batches = []
    for epoch in range(epochs):
        if isinstance(spec.dataloader.sampler, EpochSampler):
            spec.dataloader.sampler.set_epoch(epoch)
        batches += list(spec.dataloader)
    shut_down_workers(spec)
    return batches


def read_inputs(spec, epochs=1):
    """The same as the model gets them."""
    return [spec.batch_transforms(batch) for batch in read_batches(spec, epochs)]


def shut_down_workers(*specs):
    """What Composer does for the training data alone; left to the garbage collector, it may happen in a fork."""
    for spec in specs:
        spec.dataloader.close()


def assert_same_batches(batches, expected):
    assert len(batches) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_a_loader_that_was_closed_has_no_workers_and_starts_anew(name, paths):
    loader = build(name, paths, "val", num_workers=2).dataloader
    expected = list(loader)
    workers = loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    for _ in range(2):
        loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert_same_batches(list(loader), expected)
    loader.close()


# what a source gives


@pytest.mark.parametrize("name", MAP_STYLE_OR_NOT)
def test_training_drops_the_rest_and_evaluation_keeps_it(name, paths):
    train, val = build(name, paths), build(name, paths, "val")
    train_sizes = [len(labels) for _, labels in train.dataloader]
    assert train_sizes == [8] * 5 and len(train.dataloader) == 5
    batches = read_inputs(val)
    assert [len(labels) for _, labels in batches] == [8] * 5 + [3] and len(val.dataloader) == 6
    images, labels = batches[0]
    assert images.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert labels.shape == (8,) and labels.dtype == torch.int64
    assert train.num_samples == val.num_samples == NUM_IMAGES
    assert [len(part) for part, _ in val.split_batch(batches[-1], 2)] == [2, 1]


def test_streaming_evaluates_every_image_in_order_as_torchvision_would(paths):
    images, labels = random_images(NUM_IMAGES, seed=1)
    plain = Augmentation(mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    batches = read_inputs(build("streaming", paths, "val", image_size=12, augmentation=plain, num_workers=2))
    # at the image's own size and crop_pct 1 the transform is a division by 255
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


def test_folder_evaluates_class_by_class(paths):
    labels = torch.cat([labels for _, labels in read_batches(build("folder", paths, "val"))])
    assert labels.tolist() == sorted(label % 3 for label in range(NUM_IMAGES))


@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_training_sees_every_image_once_in_a_new_order_and_look_every_epoch(name, paths):
    plain = Augmentation(is_plain=True)
    spec = build(name, paths, augmentation=plain, batch_size=1)
    images = torch.cat([images for images, _ in read_inputs(spec, epochs=2)])
    assert len(images) == 2 * NUM_IMAGES
    first, second = images[:NUM_IMAGES], images[NUM_IMAGES:]
    assert not torch.equal(first, second)
    rows = {tuple(image.flatten().tolist()) for image in first}
    assert len(rows) == NUM_IMAGES and rows == {tuple(image.flatten().tolist()) for image in second}

    spec = build(name, paths, batch_size=1)
    looks = {tuple(images.flatten().tolist()) for images, _ in read_inputs(spec, epochs=2)}
    assert len(looks) > 1.9 * NUM_IMAGES


def test_synthetic_images_are_the_same_in_every_epoch_and_others_in_another_split(paths):
    def rows(split, **options):
        batches = read_batches(build("synthetic", paths, split, batch_size=43, **options), epochs=1)
        return {tuple(image.flatten().tolist()) for image in batches[0][0]}

    assert len(rows("train")) == NUM_IMAGES
    assert rows("train") == rows("train")
    assert not rows("train") & rows("val")
    assert not rows("train") & rows("train", seed=4)


def test_digits_are_all_there_and_lossless(tmp_path):
    from sklearn.datasets import load_digits

    digits = load_digits()
    plain = Augmentation(is_plain=True, mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    paths = {"digits": str(tmp_path / "deep" / "digits")}
    specs = [build("digits", paths, split, image_size=8, batch_size=1, augmentation=plain)
             for split in ("train", "val")]
    assert [spec.num_samples for spec in specs] == [1437, 360]
    for spec, is_held_out in zip(specs, (False, True), strict=True):
        chosen = (np.arange(1797) % 5 == 0) == is_held_out
        pairs = [(tuple((16 * images[0, 0]).round().int().flatten().tolist()), int(labels))
                 for images, labels in read_inputs(spec)]
        expected = zip(digits.images[chosen].reshape(-1, 64).astype(int), digits.target[chosen], strict=True)
        assert sorted(pairs) == sorted((tuple(pixels.tolist()), int(label)) for pixels, label in expected)


# randomness


def test_seeded_decides_all_three_generators_and_leaves_them_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    reproducibility.seed_all(1)
    expected = [draw(), draw()]
    with seeded(7):
        inside = draw()
    reproducibility.seed_all(1)
    actual = [draw()]
    with pytest.raises(KeyError), seeded(7):
        assert draw() == inside
        raise KeyError
    assert [*actual, draw()] == expected


def test_derived_seeds_are_the_same_in_every_process():
    # blake2b of "1/2/3", as `printf 1/2/3 | b2sum -l 64` has it, less the last bit
    digest = subprocess.run(["b2sum", "-l", "64"], input=b"1/2/3", capture_output=True).stdout.split()[0]
    assert derive_seed(1, 2, np.int64(3)) == int(digest, 16) // 2
    assert len({derive_seed(0, epoch, index) for epoch in range(10) for index in range(100)}) == 1000


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(repeats=3), Augmentation(form="timm")],
                         ids=["fast", "repeats", "timm"])
@pytest.mark.parametrize("name", MAP_STYLE_OR_NOT)
def test_workers_change_nothing_and_global_generators_are_left_alone(name, augmentation, paths):
    reproducibility.seed_all(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    expected = read_batches(build(name, paths, augmentation=augmentation), epochs=3)
    assert_same_batches(read_batches(build(name, paths, augmentation=augmentation, num_workers=2), epochs=3), expected)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("is_shuffled", [True, False])
@pytest.mark.parametrize("epoch", [0, 1])
def test_two_ranks_see_what_one_sees(is_shuffled, epoch, repeats):
    def steps(num_ranks, rank, batch_size):
        sampler = EpochSampler(
            range(NUM_IMAGES), repeats=repeats, num_replicas=num_ranks, rank=rank, shuffle=is_shuffled, seed=3,
            drop_last=True,
        )
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return [set(keys[i:i + batch_size]) for i in range(0, len(keys) - batch_size + 1, batch_size)]

    alone = steps(1, 0, 8)
    assert len(alone) == 5 and all(len(step) == 8 and {key[0] for key in step} == {epoch} for step in alone)
    assert [a | b for a, b in zip(steps(2, 0, 4), steps(2, 1, 4), strict=True)] == alone


# repeated augmentation


def assert_views(keys, *, num_parts=1):
    """Every image in all three views, but for the one at the end of each part."""
    views = {}
    for image, view in keys:
        views.setdefault(image, []).append(view)
    assert len(keys) == len(set(keys)) and all(sorted(some) == list(range(len(some))) for some in views.values())
    assert sum(len(some) < 3 for some in views.values()) <= num_parts
    return set(views)


def test_repeated_augmentation_of_a_sampler_draws_a_third_in_three_views():
    drawn = []
    sampler = EpochSampler(range(NUM_IMAGES), repeats=3, num_replicas=1, rank=0, seed=3, drop_last=True)
    for epoch in range(30):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == NUM_IMAGES and {key[0] for key in keys} == {epoch}
        assert [view for _, _, view in keys] == [0, 1, 2] * 14 + [0]
        drawn.append(frozenset(assert_views([(image, view) for _, image, view in keys])))
        assert len(drawn[-1]) == 15
    assert len(set(drawn)) == 30 and len(frozenset().union(*drawn)) == NUM_IMAGES


@pytest.mark.parametrize("form", ["fast", "timm"])
@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_views_of_an_image_are_different_pictures(name, form, paths):
    spec = build(name, paths, batch_size=9, augmentation=Augmentation(form=form, repeats=3))
    assert len(spec.dataloader) == 4
    images = torch.cat([images for images, _ in read_inputs(spec, epochs=2)])
    assert len(images) == 72
    # the first three places of a batch of nine have view 0 of three images, and so on
    for first in range(0, 72, 9):
        views = images[first:first + 9].view(3, 3, -1)
        assert not any((views[a] == views[b]).all(-1).any() for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("num_samples", [8, 9, 64])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_views_of_an_image_are_no_neighbours_in_a_batch(start, num_samples):
    images = [(start + place) // 3 for place in range(num_samples)]
    _, labels, messages = Collate(3)([(torch.zeros(1), image, []) for image in images])
    assert sorted(labels.tolist()) == images and messages == []
    assert (labels.diff() != 0).all()


# stop and resume

STOPS = {"between epochs": "ep1-ba5.pt", "within an epoch": "ep1-ba7.pt", "after its last batch": "ep1-ba10.pt"}


def is_time_to_save(state, event):
    # Composer saves once a batch: the end of the first epoch is saved as such, that of the second as a batch
    return event is (Event.EPOCH_CHECKPOINT if state.timestamp.batch == 5 else Event.BATCH_CHECKPOINT)


def train(specs, *, save_folder=None, load_path=None):
    """Two and a half epochs of a linear layer with dropout, which draws from the global generator."""
    reproducibility.seed_all(5)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * IMAGE_SIZE**2, 10))
    model = ComposerClassifier(module, num_classes=10)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_dataloader=specs[0],
        eval_dataloader=specs[1],
        max_duration="13ba",
        save_folder=save_folder,
        save_filename="ep{epoch}-ba{batch}.pt",
        save_latest_filename=None,
        save_interval=is_time_to_save,
        load_path=load_path,
        seed=5,
        device="cpu",
        progress_bar=False,
    )
    restore_generators(trainer)
    try:
        trainer.fit()
    finally:
        trainer.close()
        shut_down_workers(*specs)
    return torch.cat([parameter.flatten() for parameter in model.parameters()]).detach()


# rectangles are erased in all of them: what the device draws must go on as well
@pytest.mark.parametrize(("name", "num_workers", "changes"), [
    *((name, num_workers, {}) for name in MAP_STYLE_OR_NOT for num_workers in (0, 2)),
    ("folder", 0, {"repeats": 3}), ("streaming", 2, {"repeats": 3}),
    ("folder", 2, {"form": "timm"}), ("streaming", 0, {"form": "timm", "repeats": 3}),
])
# Composer, of a run that resumes after the last batch of an epoch: it has nothing left to do there
@pytest.mark.filterwarnings("ignore:No batches were trained:UserWarning")
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_resumed_training_ends_in_the_same_weights(name, num_workers, changes, paths, tmp_path):
    augmentation = Augmentation(random_erasing=0.5, **changes)

    def specs():
        return [build(name, paths, split, num_workers=num_workers, augmentation=augmentation)
                for split in ("train", "val")]

    expected = train(specs(), save_folder=str(tmp_path))
    for stop, checkpoint in STOPS.items():
        assert torch.equal(train(specs(), load_path=str(tmp_path / checkpoint)), expected), stop


@pytest.mark.parametrize("repeats", [1, 3])
def test_resuming_with_other_workers_ends_in_the_same_weights(repeats, paths, tmp_path):
    def specs(**options):
        augmentation = Augmentation(repeats=repeats)
        return [build("streaming", paths, split, augmentation=augmentation, **options) for split in ("train", "val")]

    expected = train(specs(), save_folder=str(tmp_path))
    checkpoint = str(tmp_path / STOPS["within an epoch"])
    assert torch.equal(train(specs(num_workers=2), load_path=checkpoint), expected)
    assert not torch.equal(train(specs(seed=4)), expected)


# the digits' folder


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
        patch.setattr("pss_composer.data.digits.write_images", die_at_the_second_split)
        process = multiprocessing.get_context("fork").Process(target=prepare_digits, args=(tmp_path / "digits",))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "digits").exists()
    prepare_digits(tmp_path / "digits")
    assert StreamingDataset(local=str(tmp_path / "digits" / "val"), batch_size=1).size == 360


# bad input


def assert_input_error(match, name, path, **options):
    settings = {"split": "train", "image_size": 16, "num_classes": 10, "batch_size": 8}
    with pytest.raises(InputError, match=match) as error:
        build_dataspec(name, path=str(path) if path else None, **(settings | options))
    assert "\n" not in str(error.value)


def test_bad_name():
    match = r"data\.name must be one of digits, folder, idx, .* \(did you mean folder\?\), got 'foldr'"
    assert_input_error(match, "foldr", None)
    assert_input_error(r"synthetic, got 'imagenet'", "imagenet", None)


def test_bad_numbers():
    match = "train_batch_size must be at least 1 on every device, got 0"
    assert_input_error(match, "synthetic", None, batch_size=0)
    assert_input_error(r"data\.num_workers must be at least 0, got -1", "synthetic", None, num_workers=-1)
    assert_input_error(r"data\.num_samples must be at least 1, got 0", "synthetic", None, num_samples=0)
    assert_input_error("split must be train or val, got 'test'", "synthetic", None, split="test")


@pytest.mark.parametrize("name", MAP_STYLE_OR_NOT)
def test_batch_larger_than_the_data(name, paths):
    match = "train_batch_size must be at most the 43 training images, got 44"
    assert_input_error(match, name, paths[name], num_samples=43, batch_size=44)
    assert len(build(name, paths, "val", batch_size=44).dataloader) == 1


@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_bad_folders(name, tmp_path):
    assert_input_error(r"data\.path must name a folder, got null", name, None)
    assert_input_error(r"data\.path must be a folder, got '.*nowhere'", name, tmp_path / "nowhere")
    assert_input_error(r"data\.path must hold a folder 'train' with images, got none in ", name, tmp_path)
    (tmp_path / "train").mkdir()
    assert_input_error(r"data\.path must hold a folder 'train' with images, got none in ", name, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["train"]


def test_bad_class_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert_input_error(r"data\.path must hold a folder of images per class: .*cat", "folder", tmp_path)
    write_folder(tmp_path, num_images=6)
    (tmp_path / "train" / "cat").rmdir()
    match = r"model\.num_classes must be at least the 3 classes in '.*train', got 2"
    assert_input_error(match, "folder", tmp_path, num_classes=2)
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "klass1")
    assert_input_error(r"the same class folders in every split, got others in '.*val'", "folder", tmp_path, split="val")


def test_bad_digits(tmp_path, monkeypatch):
    assert_input_error(r"data\.path must name a folder for the digits, got null", "digits", None)
    assert_input_error(r"model\.num_classes must be at least 10 for digits, got 9", "digits", tmp_path, num_classes=9)
    (tmp_path / "thesis.tex").touch()
    assert_input_error(r"data\.path must be a new or empty folder, or hold the digits, got '", "digits", tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_input_error(r"data\.name=digits needs scikit-learn, got none", "digits", tmp_path / "digits")
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label", [10, -1])
def test_bad_label_is_one_line_even_from_a_worker(label, num_workers, tmp_path):
    images, labels = random_images(16, seed=0)
    labels[11] = label
    for split in ("train", "val"):
        write_images(tmp_path / split, images, labels)
    specs = [build("streaming", {"streaming": str(tmp_path)}, split, num_workers=num_workers)
             for split in ("train", "val")]
    with pytest.raises(InputError) as error:
        train(specs)
    assert str(error.value) == f"labels must be in [0, model.num_classes=10), got {label}"


def test_import_needs_no_optional_library():
    # composer itself imports scikit-learn and matplotlib where they are installed
    code = ("import sys; import composer, timm; before = set(sys.modules); import pss_composer.data; "
            "print({m.partition('.')[0] for m in set(sys.modules) - before})")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pss_composer" in output
    assert not any(name in output for name in ("streaming", "sklearn", "matplotlib"))


