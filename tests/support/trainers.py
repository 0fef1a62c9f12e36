"""Short training runs of tiny ViTs in Composer, and what was seen in them."""

import torch
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pss_composer.models.classifier import ViTClassifier
from support.keep_rates import BATCH_SIZE
from support.models import build_model, random_images


def build_dataset(num_samples: int = 8 * BATCH_SIZE) -> Dataset:
    labels = torch.randint(7, (num_samples,), generator=torch.Generator().manual_seed(2))
    return TensorDataset(random_images(num_samples), labels)


def build_dataloader(num_samples: int = 8 * BATCH_SIZE, *, shuffle: bool = True, **options) -> DataLoader:
    dataset = build_dataset(num_samples)
    options = {"batch_size": BATCH_SIZE} | options
    return DataLoader(dataset, sampler=dist.get_sampler(dataset, shuffle=shuffle), **options)


def find_vit(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, VisionTransformer | Beit))


class TokenRecorder(Callback):
    """Counts, with a hook of its own, the tokens that enter the first block in every forward pass.

    Attributes:
        seen: (whether in training mode, tokens) of each pass.
        batches: Batches trained before each pass.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []
        self.batches: list[int] = []

    def after_load(self, state, logger) -> None:
        def record(block, arguments):
            self.seen.append((block.training, arguments[0].shape[1]))
            self.batches.append(int(state.timestamp.batch))

        find_vit(state.model).blocks[0].register_forward_pre_hook(record)


def build_trainer(algorithms, *, vit: str | nn.Module = "vit", lr: float = 1e-3, **options) -> Trainer:
    model = options.get("model") or ViTClassifier(build_model(vit) if isinstance(vit, str) else vit)
    arguments = dict(
        model=model,
        train_dataloader=build_dataloader(),
        max_duration="2ep",
        algorithms=algorithms,
        optimizers=torch.optim.AdamW(model.parameters(), lr=lr),
        device="cpu",
        seed=17,
        progress_bar=False,
        loggers=InMemoryLogger(),
    )
    return Trainer(**(arguments | options))


def train(*arguments, **options) -> Trainer:
    trainer = build_trainer(*arguments, **options)
    trainer.fit()
    trainer.close()
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    (logger,) = (d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    return [float(value) for _, value in logger.data[name]]


def copy_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
