"""Images from MDS shards, with the columns of streaming's `StreamingImageNet`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.util import bytes_to_int
from torch import Tensor

from pss_composer.data.augmentation.decoding import BadImage
from pss_composer.data.augmentation.transforms import Transform
from pss_composer.data.mds.shared_memory import choosing_number, free_when_dropped
from pss_composer.data.mds.stream import open_stream
from pss_composer.data.mds.views import ViewSpanner, partition_views
from pss_composer.data.samples import BadSample, Sample, load_sample
from pss_composer.data.settings import DataSettings
from pss_composer.errors import InputError, to_line
from pss_composer.seeds import derive_seed

batching_methods["views"] = partition_views


class StreamingImages(StreamingDataset):
    """An MDS folder of images `x` and labels `y` whose augmentation depends on seed, epoch, index and view alone.

    What streaming calls a sample id is a key here: image × `repeats` + view.

    Args:
        folder: Folder of one split, with its `index.json`; or its cache, for a remote.
        remote: URL of the split's folder in a store, or None.
        settings: How to stream.
        transform: Of a picture and a seed.
        batch_size: Images in the batch of one device; streaming needs it to divide the images among the workers.
        shuffle: Whether every epoch has a new order; else the order is that of the shards.
        seed: Seeds the order and the transform, at least 0.
        repeats: Views of each image that is drawn, in the same batch of the same device wherever they fit.
        on_bad_sample: `raise`, `replace` or `leave_out`, as for `load_sample`.

    Raises:
        InputError: The folder or the remote holds no MDS shards, none with samples, or other columns; the folder is the
            cache of another remote; another run uses it; or `cache_limit` is too small.
    """

    def __init__(
        self,
        folder: Path,
        *,
        remote: str | None,
        settings: DataSettings,
        transform: Transform,
        batch_size: int,
        shuffle: bool,
        seed: int,
        repeats: int,
        on_bad_sample: str,
    ) -> None:
        self.transform = transform
        self.seed = seed
        self.repeats = repeats
        self.on_bad_sample = on_bad_sample
        self._failure: BaseException | None = None
        try:
            self._stream = open_stream(folder, remote=remote, is_limited=settings.cache_limit is not None,
                                       download_retry=settings.download_retry)
            with choosing_number():
                super().__init__(
                    streams=[self._stream],
                    predownload=settings.predownload,
                    # by default `py1s` and `py2s` have 64 per machine, all made equally long by repeating images
                    num_canonical_nodes=settings.num_canonical_nodes
                    or dist.get_world_size() // dist.get_local_world_size(),
                    batch_size=batch_size,
                    shuffle=shuffle,
                    shuffle_algo=settings.shuffle_algo,
                    shuffle_block_size=settings.shuffle_block_size,
                    shuffle_seed=seed,
                )
                free_when_dropped(self)
            if settings.cache_limit is not None:
                self._limit_cache(settings.cache_limit)
        except (KeyError, TypeError, ValueError) as error:
            if hasattr(self, "_stream"):
                self._stream.close()  # the error refers to this dataset, which would keep the lock of its cache
            if isinstance(error, InputError):
                raise
            raise InputError(f"must hold MDS shards that streaming reads, got {to_line(error)!r} in {str(folder)!r}",
                             key="path") from error  # an entry of the index is missing or of another type
        self.batching_method = "views"
        self.spanner = ViewSpanner(self.spanner, repeats)
        for shard in self.shards:
            column = shard.column_names.index("x")
            if shard.column_encodings[column] in ("jpeg", "png"):
                shard.column_encodings[column] = "bytes"  # streaming would decode them with PIL

    def _limit_cache(self, cache_limit: str) -> None:
        self.cache_limit = bytes_to_int(cache_limit)
        largest = max(shard.get_max_size() for shard in self.shards)
        # below the first number, streaming finds nothing to evict and hangs; below the second, it is slow
        num_bytes = max(self._stream.get_index_size() + largest, 4 * largest)
        if self.cache_limit < num_bytes:
            raise InputError(f"must be at least {num_bytes}b, for the index and a shard and for four shards, got "
                             f"{cache_limit!r}", key="cache_limit")

    def __iter__(self) -> Iterator[Sample]:
        """This worker's samples of the next epoch; an error in place of a sample ends the epoch, see `load_sample`."""
        for sample in super().__iter__():
            yield sample
            if isinstance(sample, InputError):
                yield from repeat(sample, self.batch_size - 1)  # torch may drop an incomplete batch, and the error
                return
        if self._failure is not None:
            raise self._failure

    def on_exception(self, future: Future) -> None:
        """Keep the error of a thread, so that `__iter__` can raise it; streaming itself only ends the epoch early."""
        self._failure = self._failure or future.exception()
        with suppress(BaseException):  # streaming stops its other thread here, and raises the error again
            super().on_exception(future)

    def _ready_thread(self, it: Any) -> None:
        """Mark every sample as ready; `get_item` fetches a shard that is not there.

        streaming's own method waits until a shard is there; it never returns if another worker evicts the shard first.
        """
        it.ready_index = it.total + 1  # with the total itself, the thread that fetches ahead would end
        it.on_exit()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard, unless it is there."""
        # streaming's own method takes a lock of all processes for every sample that it fetches ahead; only a cache
        # with a limit needs that, to know which shards were used last
        if self.cache_limit or not (self._stream.folder / self.shards[shard_id].raw_data.basename).is_file():
            super().prepare_shard(shard_id, blocking)

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """The sample of a key, which streaming calls `sample_id`."""
        index, view = divmod(int(sample_id), self.repeats)
        seed = derive_seed(self.seed, self.next_epoch - 1, index, view)
        return load_sample(
            lambda index: self._load(index, seed, retry),
            index,
            num_samples=self.num_samples,
            on_bad_sample=self.on_bad_sample,
        )

    def _load(self, index: int, seed: int, retry: int) -> tuple[Tensor, int]:
        shard_id, place = self.spanner[index * self.repeats]
        shard_name = self.shards[shard_id].raw_data.basename
        name = f"sample {place} of {shard_name} in {self._stream.local!r}"
        try:
            with np.errstate(over="ignore"):  # where an offset is larger than the next one
                sample = super().get_item(index * self.repeats, retry)
            label = int(sample["y"])
        except RuntimeError as error:  # the shard was not there, however often it was asked for
            is_evicted = f"must leave {name} in the cache while it is read: {to_line(error)}", "cache_limit"
            rule, key = self._stream.errors.get(shard_name, is_evicted)
            raise self._failure or InputError(rule, key=key) from error
        except OSError as error:
            raise InputError(f"{name} must be readable, got {to_line(error)!r}") from error
        except (IndexError, ValueError, TypeError, MemoryError) as error:  # wrong offsets or lengths
            raise BadSample(f"{name} must be whole, got {to_line(error)!r}") from error
        try:
            return self.transform(sample["x"], seed), label
        except BadImage as error:
            raise BadSample(f"{name} must decode, got {str(error)!r}") from error

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The place in the data, as Composer stores it in checkpoints."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # at the end of an epoch Composer's count is back at 0, but streaming still names the epoch that
            # ended, and a resumed run would repeat it
            state["epoch"] = self.next_epoch
        return state
