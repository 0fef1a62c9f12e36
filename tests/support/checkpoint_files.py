"""What tests/test_checkpoints.py reads: files in every published layout, made of the vectors; runs of Composer.

    composer -n 2 tests/checkpoint_files.py FOLDER

trains a classifier with sharded checkpoints on two processes, and writes its moving averages to FOLDER/expected.pt.
"""

import argparse
import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from composer import Callback, Trainer
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import FSDP2Config, dist
from safetensors import safe_open
from timm.models.beit import gen_relative_position_index
from timm.models.deit import VisionTransformerDistilled
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from yacs.config import CfgNode

from support.paths import ROOT
from pss_composer import PatchSamplingSchedule
from pss_composer.training.ema import EMA
from pss_composer.pretraining.masking import PatchMasking
from pss_composer.models import SimMIM, SimMIMClassifier
from pss_composer.models.simmim import build_encoder
from pss_composer.schedules import Cyclic

DATA = ROOT / "tests" / "data"
VECTORS = safe_open(DATA / "pss_vit_vectors.safetensors", framework="pt")
PRETRAINING_VECTORS = safe_open(DATA / "simmim_pretrain_vectors.safetensors", framework="pt")
GRID = (8, 8)  # of every model in the vectors
SMALL = dict(size="tiny", image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, drop_path=0.0)


def vector_weights(name):
    """The weights of a model in the vectors, under the original's names."""
    vectors, prefix = (PRETRAINING_VECTORS, "weights/") if name == "pretraining" else (VECTORS, f"{name}/weights/")
    return OrderedDict((key.removeprefix(prefix), vectors.get_tensor(key))
                       for key in vectors.keys() if key.startswith(prefix))  # noqa: SIM118


def timm_vit_weights():
    """The model `ape_cls` as timm's ViT has it: the biases of query, key (zero) and value in one."""
    weights = vector_weights("ape_cls")
    for name in [name for name in weights if name.endswith("q_bias")]:
        query, value = weights.pop(name), weights.pop(name.replace("q_bias", "v_bias"))
        weights[name.replace("q_bias", "qkv.bias")] = torch.cat((query, torch.zeros_like(query), value))
    return weights


def distilled_vit():
    torch.manual_seed(0)
    return VisionTransformerDistilled(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)


def as_state_dict(weights):
    """As a module of the original gives it: with the indices of its bias tables, and versions of its modules."""
    state_dict = OrderedDict()
    for name, weight in weights.items():
        state_dict[name] = weight
        if name.endswith("relative_position_bias_table"):
            state_dict[name.replace("bias_table", "index")] = gen_relative_position_index(GRID)
    state_dict._metadata = OrderedDict({"": {"version": 1}})
    return state_dict


def training_state(weights):
    """State of an AdamW after a step, in groups as SimMIM's layer decay makes them, and of timm's schedule."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights.values()]
    optimizer = torch.optim.AdamW([
        {"params": parameters[:5], "weight_decay": 0.0, "group_name": "layer_0_no_decay", "lr_scale": 0.65**13},
        {"params": parameters[5:], "weight_decay": 0.05, "group_name": "layer_1_decay", "lr_scale": 0.65**12},
    ], lr=1.25e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = CosineLRScheduler(optimizer, t_initial=100, lr_min=2.5e-7, warmup_t=20, warmup_lr_init=2.5e-7,
                                  t_in_epochs=False)
    scheduler.step_update(5)
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}


def simmim_config():
    config = CfgNode({
        "BASE": [""], "DATA": {"BATCH_SIZE": 128, "DATA_PATH": "/data", "IMG_SIZE": 224, "PIN_MEMORY": True,
                               "MEAN": (0.485, 0.456, 0.406)},
        "MODEL": {"TYPE": "vit", "RESUME": "", "DROP_PATH_RATE": 0.1, "LABEL_SMOOTHING": None,
                  "VIT": {"PATCH_SIZE": 16, "EMBED_DIM": 768, "NUM_HEADS": 12, "INIT_VALUES": 0.1}},
        "TRAIN": {"EPOCHS": 100, "OPTIMIZER": {"NAME": "adamw", "BETAS": (0.9, 0.999)},
                  "LR_SCHEDULER": {"NAME": "cosine", "MULTISTEPS": []}},
    })
    config.freeze()
    return config


def simmim_file(name):
    """SimMIM's layout, and PSS's."""
    weights = vector_weights(name)
    return {"model": as_state_dict(weights), **training_state(weights), "max_accuracy": 83.7, "epoch": 99,
            "config": simmim_config(), "amp": OrderedDict(loss_scaler0={"loss_scale": 65536.0, "unskipped": 7})}


def deit_pss_file():
    """The layout of DeiT's training script; the averages are twice the weights."""
    weights = vector_weights("deit")
    averages = OrderedDict((name, 2 * weight) for name, weight in weights.items())
    return {"model": as_state_dict(weights), **training_state(weights), "epoch": 299,
            "model_ema": as_state_dict(averages), "scaler": torch.amp.GradScaler("cpu").state_dict(),
            "args": argparse.Namespace(batch_size=256, lr=5e-4, model="deit_small", opt_betas=None, cooldown=10,
                                       drop_ratio=[0.8, -0.1], pin_mem=True, output_dir="/out")}


# what the files hold -> what makes it
PUBLISHED = {
    "pretraining": lambda: simmim_file("pretraining"),
    "simmim": lambda: simmim_file("simmim"),
    "vit": lambda: {"model": as_state_dict(timm_vit_weights())},
    "distilled": lambda: {"model": distilled_vit().state_dict()},
    "deit": deit_pss_file,
}


class StopAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def train(folder, *, is_pretraining=False, ema=True, stop_at=None, **options):
    """A run of two epochs of four batches, with a checkpoint after each batch; its Trainer."""
    torch.manual_seed(0)
    if is_pretraining:
        model, algorithms = SimMIM(build_encoder(**SMALL)), [PatchMasking(unit=8)]
    else:
        model, algorithms = SimMIMClassifier(**SMALL, num_classes=7), [PatchSamplingSchedule(Cyclic())]
    dataset = TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, 4 // dist.get_world_size(), sampler=dist.get_sampler(dataset)),
        max_duration="2ep",
        optimizers=optimizer,
        schedulers=CosineAnnealingWithWarmupScheduler("1ba"),
        algorithms=algorithms + ([EMA(half_life="3ba")] if ema else []),
        callbacks=[StopAt(stop_at)] if stop_at else [],
        save_folder=str(folder), save_interval="1ba", run_name="run", progress_bar=False, device="cpu", **options,
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        assert stop_at
    trainer.close()
    return trainer


def train_sharded(folder):
    """Three batches, and the moving averages after them."""
    dist.initialize_dist("cpu")
    trainer = train(folder, stop_at=3, parallelism_config={"fsdp": FSDP2Config(state_dict_type="sharded")})
    ema = next(algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, EMA))
    assert not ema.ema_weights_active
    averages = {name: average.full_tensor() if isinstance(average, DTensor) else average
                for name, average in ema.ema_model.named_parameters_dict.items()}
    if dist.get_global_rank() == 0:
        torch.save(averages, Path(folder) / "expected.pt")


def reference_logits(name):
    return VECTORS.get_tensor(f"{name}/magnitude/1.0/logits")


def reference_images(name):
    return VECTORS.get_tensor(f"{name}/input")


def reference_config(name):
    return json.loads(VECTORS.metadata()[name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_sharded(sys.argv[1])
