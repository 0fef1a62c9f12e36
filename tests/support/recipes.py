"""The real recipes, made small enough to train two batches on a CPU."""

import json

from pss_composer import cli
from support.paths import YAMLS

SMOKE = [
    "data.name=synthetic", "data.num_workers=0", "data.num_samples=16", "max_duration=2ba", "scheduler.warmup=1ba",
    "train_batch_size=8", "eval_batch_size=8", "model.image_size=32", "model.patch_size=4", "model.embed_dim=16",
    "model.depth=2", "model.num_heads=2", "model.num_classes=7", "progress_bar=false", "save_interval=1ba",
]


# what a library calls the sizes of a model, and a small configuration of transformers
LIBRARY = ["model.pretrained=null", "model.arguments.embed_dim=16", "model.arguments.depth=2",
           "model.arguments.num_heads=2"]
HF_CONFIG = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "image_size": 32, "patch_size": 4}


def smoke(name, folder, *overrides):
    if name.startswith("finetune_"):
        return smoke_library(name, folder, *overrides)
    # the ten epochs of cooldown are longer than two batches
    smaller = ["pss.schedule.cooldown=0ep"] if name.startswith("deit") and name.endswith("_pss") else []
    smaller += ["masking.unit=8"] if "_pretrain" in name else []
    return [str(YAMLS / f"{name}.yaml"), *SMOKE, *smaller, f"save_folder={folder}", *overrides]


def smoke_library(name, folder, *overrides):
    """The same for a recipe with a library's model; that of transformers is in the folder `hf` beside the run's."""
    sizes = LIBRARY
    if name == "finetune_huggingface_pss":
        config = folder.parent / f"{folder.name}_hf" / "config.json"
        config.parent.mkdir(exist_ok=True, parents=True)
        config.write_text(json.dumps(HF_CONFIG))
        sizes = [f"model.name=hf/{config.parent}", "model.pretrained=null"]
    common = [override for override in SMOKE if override.split("=")[0] not in
              ("model.embed_dim", "model.depth", "model.num_heads")]
    return [str(YAMLS / f"{name}.yaml"), *common, *sizes, f"save_folder={folder}", *overrides]


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
