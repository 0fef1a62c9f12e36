"""Draws the figure of the README: the patches of a photograph that stay at each keep rate, and the schedule.

Run it with `python docs/idea.py [FILE]`; FILE is docs/idea.png by default.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from skimage import data, transform
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pss_composer.sampling import num_keep, sample_by_magnitude
from pss_composer.schedules import Cyclic, keep_rates

PATCH, GRID = 16, 14  # pixels of a patch, and patches of an image: those of a ViT/16 at 224 px
KEEP_RATES = (0.2, 0.4, 0.6, 0.8, 1.0)
NUM_EPOCHS, BATCHES_PER_EPOCH = 3, 180
INK, PALE = "#1f2933", "#d5dae0"
EMPTY = 0.94  # grey value


def draw(path):
    """Draw the figure into a file."""
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    tiles, schedule = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    image = load_image()
    for axes, keep_rate in zip(tiles.subplots(1, len(KEEP_RATES)), KEEP_RATES, strict=True):
        num_patches = num_keep(keep_rate, GRID**2)
        axes.imshow(keep_patches(image, num_patches), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"ρ = {keep_rate}: {num_patches} patches", color=INK, fontsize=10)
    tiles.suptitle(f"An image is cut into {GRID**2} patches. A training batch at keep rate ρ keeps a share of them "
                   "and pays for those alone.", color=INK, fontsize=10)
    draw_schedule(schedule.subplots())
    schedule.suptitle("The schedule moves ρ from batch to batch: 0.2 → 1 → 0.2 in every epoch.", color=INK, fontsize=10)
    figure.savefig(path, dpi=150)


def load_image():
    """A photograph as grey values (224, 224)."""
    pixels = data.chelsea()[:, 75:375]
    image = torch.tensor(transform.resize(pixels.mean(axis=2) / 255, (PATCH * GRID, PATCH * GRID))).float()
    darkest, brightest = image.quantile(torch.tensor([0.01, 0.99]))
    return 0.85 * ((image - darkest) / (brightest - darkest)).clamp(0, 1)  # darker than an empty square


def keep_patches(image, num_patches):
    """The image with an empty square in the place of each dropped patch, and white lines where it is cut."""
    patches = pixel_unshuffle(image[None, None], PATCH).flatten(2).transpose(1, 2)  # (1, N, pixels of a patch)
    # a trained model compares the embeddings of patches; here their pixels, less the mean, take that place
    kept = sample_by_magnitude(patches - patches.mean(), num_patches).unsqueeze(2).expand(-1, -1, PATCH**2)
    shown = torch.full_like(patches, EMPTY).scatter(1, kept, patches.gather(1, kept))
    cut = pixel_shuffle(shown.transpose(1, 2).unflatten(2, (GRID, GRID)), PATCH)[0, 0]
    cut[::PATCH] = cut[:, ::PATCH] = 1
    return cut.numpy()


def draw_schedule(axes):
    """Draw the keep rate of every batch of a few epochs."""
    rates = keep_rates(Cyclic(start=0.2, end=1.1, step=0.2, period="1ep"), epochs=NUM_EPOCHS,
                       batches_per_epoch=BATCHES_PER_EPOCH)
    epochs = [batch / BATCHES_PER_EPOCH for batch in range(len(rates) + 1)]
    rates = [*rates, rates[-1]]
    axes.fill_between(epochs, rates, step="post", color=PALE)
    axes.step(epochs, rates, where="post", color=INK)
    axes.set(xlim=(0, NUM_EPOCHS), ylim=(0, 1.1), xticks=range(NUM_EPOCHS + 1), yticks=KEEP_RATES, xlabel="epoch",
             ylabel="keep rate ρ")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
