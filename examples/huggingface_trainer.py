"""Trains a Hugging Face ViT on digits with the Trainer, with PSS by one callback; evaluates it at five keep rates.

Run it with `python examples/huggingface_trainer.py`, after `pip install transformers accelerate`.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from pss_composer import apply_patch_sampling
from pss_composer.integrations.transformers import PatchSamplingCallback
from pss_composer.schedules import Cyclic

num_epochs = 10
set_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, size=24).expand(-1, 3, -1, -1)
data = [{"pixel_values": image, "labels": label} for image, label in zip(images, digits.target, strict=True)]
train_data, eval_data = torch.utils.data.random_split(data, [1437, 360])

vit = ViTForImageClassification(ViTConfig(
    image_size=24, patch_size=4, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
    num_labels=10, initializer_range=0.1,  # of the library's 0.02, so narrow a ViT learns little in ten epochs
))
trainer = Trainer(
    model=vit,
    args=TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=num_epochs, per_device_train_batch_size=32, learning_rate=2e-3,
        per_device_eval_batch_size=360, save_strategy="no", logging_steps=45, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    ),
    train_dataset=train_data,
    eval_dataset=eval_data,
    compute_metrics=lambda results: {"accuracy": (results.predictions.argmax(axis=1) == results.label_ids).mean()},
    # the one line: ρ goes from 0.2 to 1 and back in every epoch; the last epoch has all tokens
    callbacks=[PatchSamplingCallback(Cyclic(start=0.2, end=1.1, cooldown="1ep"))],
)
trainer.train()

for keep_rate in (1.0, 0.8, 0.6, 0.4, 0.2):
    apply_patch_sampling(vit, eval_keep_rate=keep_rate)
    print(f"keep rate {keep_rate:.1f}: {100 * trainer.evaluate()['eval_accuracy']:.1f} % of held-out digits")
