"""What tests/integrations/test_lightning.py trains on two processes, and on one to compare.

    composer -n 2 tests/support/lightning_script.py FOLDER

writes FOLDER/RANK.pt for each process: the tokens of every forward pass in training and in validation, and the weights.
"""

import sys
from pathlib import Path

import lightning
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pss_composer.integrations.lightning import PatchSamplingCallback
from pss_composer.schedules import Cyclic


class Classifier(lightning.LightningModule):
    """A ViT that notes the tokens that enter its first block: (is training, tokens)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vit = VisionTransformer(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)
        self.vit.blocks[0].register_forward_pre_hook(
            lambda block, arguments: self.seen.append((block.training, arguments[0].shape[1])))
        self.seen = []

    def training_step(self, batch):
        return cross_entropy(self.vit(batch[0]), batch[1])

    validation_step = training_step

    def train_dataloader(self):
        """The same global batches on every number of processes; Lightning itself would shuffle them on two."""
        data, world_size = build_data(), self.trainer.world_size
        sampler = DistributedSampler(data, world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, 8 // world_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(build_data(), 32)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def build_data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(64, 3, 32, 32, generator=generator), torch.randint(7, (64,), generator=generator))


def train(num_processes):
    """Two epochs of 8 batches, in steps of 2, of 8 images each in all processes."""
    model = Classifier()
    callback = PatchSamplingCallback(Cyclic(period="64sp"), eval_keep_rate=0.4)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=num_processes, strategy="ddp" if num_processes > 1 else "auto", max_epochs=2,
        accumulate_grad_batches=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )
    trainer.fit(model)
    return {"seen": model.seen, "weights": model.state_dict()}


def main(folder):
    torch.set_num_threads(1)
    results = train(2)
    torch.save(results, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
