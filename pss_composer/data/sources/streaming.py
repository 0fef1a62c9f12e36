"""MDS shards in the columns of `StreamingImageNet`, in a folder or in a store that a folder caches."""

from __future__ import annotations

from pathlib import Path

from pss_composer.data.mds.dataset import StreamingImages
from pss_composer.data.sources import Request


def open_images(request: Request) -> StreamingImages:
    """The shards in the folder of the split, or their cache there and the split's folder in the remote."""
    settings = request.settings
    if settings.remote is None:
        return open_shards(request, request.find_split(), remote=None)
    cache = (Path(settings.local) if settings.local else request.path) / request.split
    return open_shards(request, cache, remote=f"{settings.remote.rstrip('/')}/{request.split}")


def open_shards(request: Request, folder: Path, *, remote: str | None) -> StreamingImages:
    """The shards in a folder, or a remote that it caches."""
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
