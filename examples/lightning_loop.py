"""Trains a ViT on digits with Lightning, with PSS by one callback, then evaluates it at five keep rates.

Run it with `python examples/lightning_loop.py`, after `pip install lightning`.
"""

import lightning
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from pss_composer.integrations.lightning import PatchSamplingCallback
from pss_composer.schedules import Cyclic


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=64, depth=4,
                                     num_heads=4, num_classes=10)

    def training_step(self, batch):
        images, labels = batch
        return cross_entropy(self.vit(images), labels)

    def validation_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.vit(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def build_trainer(callback):
    return lightning.Trainer(max_epochs=num_epochs, callbacks=[callback], accelerator="cpu", logger=False,
                             enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)


num_epochs = 10
lightning.seed_everything(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, size=24).expand(-1, 3, -1, -1)
data = TensorDataset(images, torch.tensor(digits.target))
train_data, eval_data = torch.utils.data.random_split(data, [1437, 360])
eval_loader = DataLoader(eval_data, batch_size=360)

model = Classifier()
# the one line: ρ goes from 0.2 to 1 and back in every epoch; the last epoch has all tokens
trainer = build_trainer(PatchSamplingCallback(Cyclic(start=0.2, end=1.1, cooldown="1ep")))
trainer.fit(model, DataLoader(train_data, batch_size=32, shuffle=True))

for keep_rate in (1.0, 0.8, 0.6, 0.4, 0.2):
    callback = PatchSamplingCallback(eval_keep_rate=keep_rate)
    (metrics,) = build_trainer(callback).validate(model, eval_loader, verbose=False)
    print(f"keep rate {keep_rate:.1f}: {100 * metrics['accuracy']:.1f} % of held-out digits")
