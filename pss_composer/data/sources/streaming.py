"""MDS shards with the columns of streaming's `StreamingImageNet`, from a folder, or from a store through a cache."""

from __future__ import annotations

from pathlib import Path

from pss_composer.data.mds.dataset import StreamingImages
from pss_composer.data.sources import Request


def open_images(request: Request) -> StreamingImages:
    """The shards of a split: from its folder in `path`, or from its folder in `remote`, cached in `local` or `path`."""
    settings = request.settings
    if settings.remote is None:
        return open_shards(request, request.find_split(), remote=None)
    cache = (Path(settings.local) if settings.local else request.path) / request.split
    return open_shards(request, cache, remote=f"{settings.remote.rstrip('/')}/{request.split}")


def open_shards(request: Request, folder: Path, *, remote: str | None) -> StreamingImages:
    """The shards of a split.

    Args:
        request: What the source is asked for.
        folder: Folder of the split, or its cache.
        remote: URL of the split's folder in a store, or None.

    Raises:
        InputError: As `StreamingImages` does.
    """
    return StreamingImages(
        folder,
        remote=remote,
        settings=request.settings,
        transform=request.transform,
        batch_size=request.batch_size,
        shuffle=request.split == "train",
        seed=request.seed,
        repeats=request.repeats,
        on_bad_sample=request.on_bad_sample,
    )
