"""What tests/training/test_distributed.py trains: on one process as a module, on several by Composer's launcher.

    composer -n 2 tests/support/distributed_script.py FOLDER

writes FOLDER/CASE/RANK.json for every case: what the rank logged, and a digest of its weights; of a recipe, the
contents of its `metrics.jsonl`. One call for all cases: the processes import Composer once.
"""

import hashlib
import json
import sys
import traceback
from pathlib import Path

import torch
from composer import DataSpec, Trainer
from composer.algorithms import GradientClipping, LabelSmoothing
from composer.core import Event
from composer.loggers import InMemoryLogger
from composer.utils import FSDP2Config, dist, reproducibility
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from pss_composer import PatchSamplingSchedule, cli
from pss_composer.models.deit import DeiT
from pss_composer.models.shape import ViTShape
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.schedules import Cyclic
from pss_composer.training.ema import EMA
from pss_composer.training.mixing import MixUpCutMix
from support.library import smoke_library

BATCH_SIZE = 8
BATCHES_PER_EPOCH = 10
SMALL = dict(size="tiny", image_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)

MODELS = {"deit": DeiT, "simmim": SimMIMClassifier}
PARALLELISMS = {
    "ddp": dict,
    "fsdp2": lambda: {"parallelism_config": {"fsdp": FSDP2Config()}},
    "fsdp2_full": lambda: {"parallelism_config": {"fsdp": FSDP2Config(state_dict_type="full")}},  # as recipes have it
    "fsdp2_checkpointing": lambda: {"parallelism_config": {"fsdp": FSDP2Config(activation_checkpointing=True)}},
}
RESUMED = ("ddp", "fsdp2", "fsdp2_full")
STOPS = ("ep0-ba3", "ep1-ba14")

TINY = [
    "data.name=synthetic", "data.path=null", "data.num_workers=0", "model.depth=2", "model.embed_dim=32",
    "model.num_heads=2", "model.image_size=32", "model.patch_size=4", "train_batch_size=8", "eval_batch_size=8",
    "scheduler.warmup=1ba", "progress_bar=false",
]
FINETUNE = ["yamls/deit_small_224_pss.yaml", *TINY, "data.num_samples=16", "model.num_classes=10", "max_duration=2ba",
            "pss.schedule.cooldown=0ep", "autoresume=true"]
PRETRAIN = [
    "yamls/simmim_vitb_pretrain_pss.yaml", *TINY, "data.num_samples=32", "model.drop_path=0", "masking.unit=8",
    "max_duration=4ba", "eval_interval=4ba", "optimizer.lr=5e-3",
    # torch 2.7 sums FSDP2's gradients over processes where they talk by gloo (by NCCL it averages): Adam does not mind,
    # clipping does
    "gradient_clipping=null",
]
LIBRARY = ["max_duration=2ba", "eval_interval=2ba", "gradient_clipping=null", "ema.smoothing=0.5", "optimizer.lr=5e-3",
           "scheduler.warmup=0ep"]
WAYS = {
    "ddp": ["parallelism=ddp"],
    "ddp_checkpointing": ["parallelism=ddp", "activation_checkpointing=true", "microbatch_size=2"],
    "fsdp2_checkpointing": ["parallelism=fsdp2", "activation_checkpointing=true", "microbatch_size=2"],
}
# two runs of one name are one run and its autoresume
RECIPES = {
    "finetune-fsdp2": [*FINETUNE, "parallelism=fsdp2"],
    "pretrain-ddp": [*PRETRAIN, "parallelism=ddp"],
    "pretrain-fsdp2": [*PRETRAIN, "parallelism=fsdp2"],
    "pretrain-checkpointing": [*PRETRAIN, "parallelism=fsdp2", "activation_checkpointing=true", "microbatch_size=2"],
}


def build_dataspec(*, shuffle: bool) -> DataSpec:
    """Images whose label can be learnt; every number of processes sees the same global batches."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(7, (BATCH_SIZE * BATCHES_PER_EPOCH,), generator=generator)
    images = torch.randn(len(labels), 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 4
    dataset = TensorDataset(images, labels)
    batch_size = BATCH_SIZE // dist.get_world_size()
    return DataSpec(DataLoader(dataset, batch_size, sampler=dist.get_sampler(dataset, shuffle=shuffle)))


def run(name: str, algorithms: list, *, drop_path: float = 0.0, **options) -> dict:
    """Train two epochs; what was logged, and a digest of the weights (of this rank's shards of them)."""
    reproducibility.seed_all(3)  # every rank starts from the same weights
    model = MODELS[name](ViTShape(**SMALL, drop_path=drop_path))
    logger = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=build_dataspec(shuffle=True),
        eval_dataloader=build_dataspec(shuffle=False),
        eval_interval="5ba",
        max_duration="2ep",
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        algorithms=algorithms,
        loggers=logger,
        progress_bar=False,
        device="cpu",
        seed=17,
        dist_timeout=60,
        **options,
    )
    trainer.fit()
    digest = hashlib.sha256()
    for value in trainer.state.model.state_dict().values():
        value = value.to_local() if isinstance(value, DTensor) else value
        digest.update(value.detach().contiguous().numpy().tobytes())
    trainer.close()
    names = {"losses": "loss/train/total", "eval_losses": "metrics/eval/cross_entropy", "keep_rates": "pss/keep_rate",
             "tokens": "pss/tokens"}
    results = {key: [float(value) for _, value in logger.data[name]] for key, name in names.items()}
    return results | {"weights": digest.hexdigest()}


def compare(name: str, parallelism: str) -> dict:
    """The run that must not depend on the number of processes: nothing in it is random."""
    algorithms = [PatchSamplingSchedule(Cyclic()), EMA(half_life="3ba"), GradientClipping("norm", 1.0)]
    return run(name, algorithms, **PARALLELISMS[parallelism]())


def resume(name: str, parallelism: str, folder: Path) -> dict:
    """A run without a stop, and those that go on from its checkpoints; everything in it is random."""

    def run_random(**options) -> dict:
        algorithms = [PatchSamplingSchedule(Cyclic(), sampler="random"), EMA(half_life="3ba"), MixUpCutMix(7),
                      LabelSmoothing(0.1)]
        return run(name, algorithms, drop_path=0.3, device_train_microbatch_size=2, **PARALLELISMS[parallelism](),
                   **options)

    # each checkpoint takes time, and the averages stay in the model when one is the last thing in training
    saved = {int(stop.split("-ba")[1]) for stop in STOPS} | {2 * BATCHES_PER_EPOCH}
    results = {"straight": run_random(
        save_folder=str(folder),
        save_interval=lambda state, event: event == Event.BATCH_CHECKPOINT and state.timestamp.batch.value in saved,
    )}
    for stop in STOPS:
        checkpoint = folder / (stop if parallelism == "fsdp2" else f"{stop}-rank0.pt")
        results[stop] = run_random(load_path=str(checkpoint), save_folder=f"{folder}-{stop}", save_interval="1ep")
    return results


def train_recipe(arguments: list[str], folder: Path, *, times: int = 1) -> dict:
    """What stands in `metrics.jsonl` after each of several calls of one command."""
    metrics = []
    for _ in range(times):
        cli.main(["train", *arguments, f"save_folder={folder}"])
        dist.barrier()
        metrics.append((folder / "metrics.jsonl").read_text())
        dist.barrier()
    return {"metrics": metrics}


def train_library(library: str, way: str, folder: Path) -> dict:
    """A recipe with a library's model."""
    path, *overrides = smoke_library(library, folder, *LIBRARY, *WAYS[way])
    cli.main(["train", path, *overrides])
    dist.barrier()
    return {"metrics": (folder / "metrics.jsonl").read_text()}


def main(folder: Path) -> None:
    cases = {f"compare-{name}-{parallelism}": lambda name=name, parallelism=parallelism: compare(name, parallelism)
             for name in MODELS for parallelism in PARALLELISMS}
    cases |= {f"resume-{name}-{parallelism}": lambda name=name, parallelism=parallelism: resume(
        name, parallelism, folder / f"checkpoints-{name}-{parallelism}") for name in MODELS for parallelism in RESUMED}
    cases |= {name: lambda name=name, arguments=arguments: train_recipe(
        arguments, folder / f"run-{name}", times=2 if "autoresume=true" in arguments else 1)
        for name, arguments in RECIPES.items()}
    cases |= {f"{library}-{way}": lambda library=library, way=way: train_library(
        library, way, folder / f"run-{library}-{way}") for library in ("hf", "torchvision") for way in WAYS}
    for case, train in cases.items():
        try:
            results = train()
        except BaseException:
            results = {"error": traceback.format_exc()}
        file = folder / case / f"{dist.get_global_rank()}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
