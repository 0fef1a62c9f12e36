"""The settings of streaming, in streaming's own words."""

from __future__ import annotations

from dataclasses import dataclass

from pss_composer.errors import InputError

SHUFFLE_ALGOS = ("py1e", "py1br", "py1s", "py2s", "naive")


@dataclass
class StreamingSettings:
    """How `data.name: streaming` reads its shards (https://docs.mosaicml.com/projects/streaming).

    Args:
        remote: Folder of folders of shards, one per split, in a store: `s3://`, `sftp://` and what else streaming
            knows. None: the shards are in `data.path`.
        local: Folder that caches the shards of `remote`, for one run at a time; None: `data.path`.
        cache_limit: Size of each split's cache, like `100gb`; the shards that were not used for longest make room.
            None: all are kept.
        predownload: Samples that each worker fetches ahead; None: eight batches.
        download_retry: How often a file is asked for before training stops; the waits between double from a second on,
            so 7 outlast a minute without the store.
        shuffle_algo: One of `SHUFFLE_ALGOS`. `py1e` mixes the samples of many shards; `py1s` those of as many shards
            as there are canonical nodes.
        shuffle_block_size: Samples that `py1e` and `py1br` mix; a cache should hold the shards of twice as many.
        num_canonical_nodes: Parts that the shards are dealt to; the same number gives the same order on any number of
            machines that divides it. None: the number of machines that training starts on.
    """

    remote: str | None = None
    local: str | None = None
    cache_limit: str | None = None
    predownload: int | None = None
    download_retry: int = 7
    shuffle_algo: str = "py1e"
    shuffle_block_size: int = 2**18
    num_canonical_nodes: int | None = None


def check_streaming(settings: StreamingSettings, *, name: str) -> None:
    """Check the values that can be checked without the data.

    Args:
        settings: The settings.
        name: `data.name`.

    Raises:
        InputError: A setting breaks a rule.
    """
    s = settings
    if name != "streaming" and s.remote is not None:
        raise InputError(f"data.remote must be null unless data.name=streaming, got {s.remote!r} for {name}")
    for key in ("local", "cache_limit"):
        if s.remote is None and getattr(s, key) is not None:
            raise InputError(f"data.{key} must be null without data.remote, got {getattr(s, key)!r}")
    for key in ("predownload", "download_retry", "shuffle_block_size", "num_canonical_nodes"):
        value = getattr(s, key)
        if value is not None and value < 1:
            raise InputError(f"data.{key} must be at least 1, got {value}")
    if s.shuffle_algo not in SHUFFLE_ALGOS:
        raise InputError(f"data.shuffle_algo must be one of {', '.join(SHUFFLE_ALGOS)}, got {s.shuffle_algo!r}")
