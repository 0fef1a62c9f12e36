"""How fast pictures come, against the original's loader: `python -m benchmarks.loader`.

A few thousand JPEGs of 500 × 375 are cut from the photographs that ship in scikit-learn and scikit-image, and converted
to shards, as they are and with a shortest side of 256. The original's loader (torchvision's ImageFolder, timm's
create_transform, torch's DataLoader) and this project's loaders read them in the same number of workers; all take turns
in every round, in an order that is shuffled anew, and each reads a whole epoch. The medians count. Beside the clock's
time stands the processor's, of workers and main process, which other programs on the machine disturb less. A worker is
weighed at the end of its loader's last epoch: what is its own, and its share of what it shares.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.step_time import describe_machine, positive_int, print_table
from pss_composer.data import Augmentation, build_dataspec
from pss_composer.data.prepare.convert import convert_images

WIDTH, HEIGHT, QUALITY = 500, 375, 90
NUM_CLASSES = 10
DEIT = {"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "random_erasing": 0.25}
# at least so many times as fast as the original; set for 2 CPU cores
BARS = {("train", "shards"): 1.5, ("train", "shards 256"): 2.2, ("val", "shards"): 2.0}
ORIGINAL = "original"


class Contestant:
    """A loader with workers that stay alive from epoch to epoch.

    Args:
        loader: Yields batches of images first.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.rates: list[float] = []  # images per second, one for each epoch
        self.costs: list[float] = []  # seconds of the processor per image

    def read_epoch(self) -> None:
        start, start_cpu, num_images = time.perf_counter(), self._measure_cpu(), 0
        for batch in self.loader:
            num_images += len(batch[0])
        self.rates.append(num_images / (time.perf_counter() - start))
        self.costs.append((self._measure_cpu() - start_cpu) / num_images)

    def _measure_cpu(self) -> float:
        workers = [] if self.loader._iterator is None else self.loader._iterator._workers
        return time.process_time() + sum(measure_cpu(worker.pid) for worker in workers)

    def weigh_workers(self) -> float:
        """MiB of one worker: the median over its loader's."""
        return median(measure_memory(worker.pid) for worker in self.loader._iterator._workers)


def measure_memory(pid: int) -> float:
    """MiB of a process: its own pages, and its share of those that it shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure_cpu(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load_photographs() -> list[Image.Image]:
    """Colour photographs of everyday scenes, all from installed packages."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    skimage_photographs = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    return [Image.fromarray(pixels) for pixels in (*load_sample_images().images, *skimage_photographs)]


def write_pictures(folder: Path, num_images: int) -> None:
    """Cut that many JPEGs, each another part of a photograph, into folders of classes."""
    generator = random.Random(0)
    photographs = load_photographs()
    for number in range(num_images):
        photograph = generator.choice(photographs)
        width = generator.uniform(0.6, 1.0) * min(photograph.width, photograph.height * WIDTH / HEIGHT)
        height = width * HEIGHT / WIDTH
        left = generator.uniform(0, photograph.width - width)
        top = generator.uniform(0, photograph.height - height)
        box = (left, top, left + width, top + height)
        picture = photograph.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box)
        path = folder / f"class{number % NUM_CLASSES}" / f"{number:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=QUALITY)


def prepare_data(folder: Path, num_images: int) -> float:
    """Write the pictures and shards, unless they are there; the mean size of a picture, in kB."""
    jpegs = folder / f"{num_images}"
    for split in ("train", "val"):
        if not (jpegs / split).is_dir():
            write_pictures(jpegs / split, num_images)
    with contextlib.redirect_stdout(None):
        convert_images(jpegs, str(folder / f"{num_images}-shards"))
        convert_images(jpegs, str(folder / f"{num_images}-shards-256"), shortest_side=256)
    return float(np.mean([path.stat().st_size for path in jpegs.glob("train/*/*")])) / 1000


def build_contestants(folder: Path, num_images: int, split: str, args: argparse.Namespace) -> dict[str, Contestant]:
    """The loaders of a split by name, the original's first."""
    is_training = split == "train"
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    transform = create_transform(
        args.image_size, is_training=is_training, interpolation="bicubic", crop_pct=224 / 256,
        auto_augment=DEIT["rand_augment"], color_jitter=DEIT["color_jitter"], re_prob=DEIT["random_erasing"],
        re_mode="pixel",
    )
    original = DataLoader(
        ImageFolder(str(folder / f"{num_images}" / split), transform), shuffle=is_training, drop_last=is_training,
        persistent_workers=True, **options,
    )

    def build(name: str, data: str, **augmentation: object) -> Contestant:
        return Contestant(build_dataspec(
            name, split=split, path=str(folder / data), image_size=args.image_size, num_classes=NUM_CLASSES,
            augmentation=Augmentation(**DEIT, **augmentation), **options,
        ).dataloader)

    contestants = {
        ORIGINAL: Contestant(original),
        "shards": build("streaming", f"{num_images}-shards"),
        "shards 256": build("streaming", f"{num_images}-shards-256"),
        "folder": build("folder", f"{num_images}"),
    }
    if is_training:
        contestants["shards, repeats=3"] = build("streaming", f"{num_images}-shards", repeats=3)
        contestants["shards, form=timm"] = build("streaming", f"{num_images}-shards", form="timm")
    return contestants


def compete(contestants: dict[str, Contestant], num_rounds: int) -> None:
    """Let every loader read an epoch in every round; the first epoch, in which workers start, does not count."""
    generator = random.Random(0)
    names = list(contestants)
    for _ in range(1 + num_rounds):
        generator.shuffle(names)
        for name in names:
            contestants[name].read_epoch()
    for contestant in contestants.values():
        del contestant.rates[0], contestant.costs[0]


def list_rows(split: str, contestants: dict[str, Contestant], num_cores: int) -> Iterator[list[str]]:
    """The lines of the table."""
    original = contestants[ORIGINAL]
    for name, contestant in contestants.items():
        rate, cost = median(contestant.rates), median(contestant.costs)
        ratio = rate / median(original.rates)
        bar = BARS.get((split, name))
        verdict = "" if bar is None else f"{bar:.1f} {'met' if ratio >= bar else 'NOT MET'}"
        saving = median(original.costs) / cost
        memory = contestant.weigh_workers()
        yield [split, name, f"{rate / num_cores:.0f}", f"{ratio:.2f}", verdict, f"{1000 * cost:.2f}", f"{saving:.2f}",
               f"{memory:.0f}"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=positive_int, default=2400, help="in each split")
    parser.add_argument("--image-size", type=positive_int, default=224, help="that the model sees")
    parser.add_argument("--batch-size", type=positive_int, default=64)
    parser.add_argument("--workers", type=positive_int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=positive_int, default=7, help="epochs of each loader that count")
    parser.add_argument("--data", type=Path, help="folder that keeps the pictures and shards; none: a temporary one")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    args.threads, args.device = 1, "cpu"
    num_cores = min(args.workers, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        folder = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kilobytes = prepare_data(folder, args.images)
        print(describe_machine(args))
        print(f"{args.images} pictures of {WIDTH} × {HEIGHT}, {kilobytes:.0f} kB each, to {args.image_size} px; "
              f"batches of {args.batch_size}, {args.workers} workers on {num_cores} cores, {args.rounds} rounds\n")
        rows = []
        for split in ("train", "val"):
            contestants = build_contestants(folder, args.images, split, args)
            compete(contestants, args.rounds)
            rows += list_rows(split, contestants, num_cores)
            del contestants
        print_table(["", "loader", "images/s per core", "× original", "at least", "CPU ms per image", "× original",
                     "MiB per worker"], rows)


if __name__ == "__main__":
    main()
