"""Checkpoint files in every published layout, made of the vectors, and the model that each is of."""

import argparse
from collections import OrderedDict

import torch
from safetensors import safe_open
from timm.models.beit import gen_relative_position_index
from timm.models.deit import VisionTransformerDistilled
from timm.scheduler import CosineLRScheduler
from torch import nn
from yacs.config import CfgNode

from pss_composer.models.deit import DeiT
from pss_composer.models.shape import ViTShape
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.pretraining.simmim import SimMIM, build_encoder
from support.paths import VECTORS as FOLDER

VECTORS = safe_open(FOLDER / "pss_vit_vectors.safetensors", framework="pt")
PRETRAINING_VECTORS = safe_open(FOLDER / "simmim_pretrain_vectors.safetensors", framework="pt")
GRID = (8, 8)  # of every model in the vectors
FORMATS = {"zip": True, "legacy": False}


def shape(**options):
    """The shape of every model in the vectors, or another one."""
    small = dict(size="tiny", image_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)
    return ViTShape(**{**small, "drop_path": 0.0, **options})


BUILD = {
    "pretraining": lambda **options: SimMIM(build_encoder(shape(**options))),
    "simmim": lambda **options: SimMIMClassifier(shape(**options)),
    "vit": lambda **options: DeiT(shape(**options)),
    "distilled": lambda **options: DeiT(shape(**options), is_distilled=True),
    "deit": lambda **options: DeiT(shape(**options), relative_position_bias=True),
}


def save(contents, path, kind="zip"):
    torch.save(contents, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


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
    """As a module of the original returns it: with the indices of its bias tables, and versions of its modules."""
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
    """SimMIM's layout, which is also PSS's."""
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


# the model that a file is of -> what makes the file's contents
PUBLISHED = {
    "pretraining": lambda: simmim_file("pretraining"),
    "simmim": lambda: simmim_file("simmim"),
    "vit": lambda: {"model": as_state_dict(timm_vit_weights())},
    "distilled": lambda: {"model": distilled_vit().state_dict()},
    "deit": deit_pss_file,
}


def with_weights(contents, **weights):
    return {**contents, "model": contents["model"] | {name.replace("__", "."): w for name, w in weights.items()}}


def without_weight(contents, name):
    return {**contents, "model": {key: weight for key, weight in contents["model"].items() if key != name}}


def reference_logits(name):
    return VECTORS.get_tensor(f"{name}/magnitude/1.0/logits")


def reference_images(name):
    return VECTORS.get_tensor(f"{name}/input")
