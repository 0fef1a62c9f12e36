"""The real recipes, made small enough to train two batches on a CPU."""

import json

from pss_composer import cli
from support.paths import YAMLS

SMOKE = [
    "data.name=synthetic", "data.num_workers=0", "data.num_samples=16", "max_duration=2ba", "scheduler.warmup=1ba",
    "train_batch_size=8", "eval_batch_size=8", "model.image_size=32", "model.patch_size=4", "model.embed_dim=16",
    "model.depth=2", "model.num_heads=2", "model.num_classes=7", "progress_bar=false", "save_interval=1ba",
]


def smoke(name, folder, *overrides):
    # the ten epochs of cooldown are longer than two batches
    smaller = ["pss.schedule.cooldown=0ep"] if name.startswith("deit") and name.endswith("_pss") else []
    smaller += ["masking.unit=8"] if "_pretrain" in name else []
    return [str(YAMLS / f"{name}.yaml"), *SMOKE, *smaller, f"save_folder={folder}", *overrides]


def read_log(folder):
    settings, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ("pss/slot" in settings["settings"]) == any("pss/keep_rate" in line for line in lines)
    return lines


def train_by_command(arguments):
    """`pss train ARGUMENTS`, in this process."""
    cli.main(["train", *arguments])


def split(arguments):
    """The two arguments of `load_recipe`."""
    return arguments[0], arguments[1:]
