"""Adds PSS to a Composer recipe of your own with one line.

Run it with `python examples/composer_recipe.py`.
"""

import timm
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from pss_composer import PatchSamplingSchedule
from pss_composer.schedules import Cyclic

torch.manual_seed(0)
digits = load_digits()
images = torch.nn.functional.interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, size=24)
data = TensorDataset(images.expand(-1, 3, -1, -1), torch.tensor(digits.target))
train_data, eval_data = torch.utils.data.random_split(data, [1437, 360])

vit = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=64, depth=4, num_heads=4,
                        num_classes=10)
trainer = Trainer(
    model=ComposerClassifier(vit),
    train_dataloader=DataLoader(train_data, batch_size=32, shuffle=True, drop_last=True),
    eval_dataloader=DataLoader(eval_data, batch_size=360),
    optimizers=torch.optim.AdamW(vit.parameters(), lr=1e-3),
    max_duration="10ep",
    eval_interval="5ep",
    # the one line: ρ goes from 0.2 to 1 and back in every epoch; the last epoch has all tokens
    algorithms=[PatchSamplingSchedule(Cyclic(start=0.2, end=1.1, cooldown="1ep"), sampler="magnitude")],
    progress_bar=False,
)
trainer.fit()
print({name: round(float(value), 3) for name, value in trainer.state.eval_metric_values.items()})
