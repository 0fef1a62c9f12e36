"""Uses patch sampling in a plain PyTorch loop, then evaluates the trained model at five keep rates.

Run it with `python examples/plain_pytorch.py`.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

from pss_composer import apply_patch_sampling
from pss_composer.schedules import Cyclic, keep_rates

torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images).float().unsqueeze(1) / 16, size=24).expand(-1, 3, -1, -1)
labels = torch.tensor(digits.target)
train_images, train_labels, eval_images, eval_labels = images[:1437], labels[:1437], images[1437:], labels[1437:]

vit = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, embed_dim=64, depth=4, num_heads=4,
                        num_classes=10)
sampler = apply_patch_sampling(vit, sampler="random")
optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)

num_epochs, batch_size = 10, 32
batches_per_epoch = len(train_labels) // batch_size
rates = iter(keep_rates(Cyclic(start=0.2, end=1.1), epochs=num_epochs, batches_per_epoch=batches_per_epoch))
for epoch in range(num_epochs):
    order = torch.randperm(len(train_labels))
    for batch in order[: batches_per_epoch * batch_size].view(batches_per_epoch, batch_size):
        sampler.keep_rate = next(rates)
        loss = cross_entropy(vit(train_images[batch]), train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

vit.eval()
with torch.no_grad():
    for sampler.eval_keep_rate in (1.0, 0.8, 0.6, 0.4, 0.2):
        accuracy = (vit(eval_images).argmax(dim=1) == eval_labels).float().mean().item()
        print(f"keep rate {sampler.eval_keep_rate:.1f}: {100 * accuracy:.1f} % of held-out digits")
