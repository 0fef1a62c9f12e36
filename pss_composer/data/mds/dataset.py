"""Images from MDS shards, with the columns of streaming's `StreamingImageNet`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import sleep, time_ns
from typing import Any

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
from streaming.base.world import World

from pss_composer.data.samples import BadSample, Sample, load_sample
from pss_composer.data.mds.stream import CacheLock, ShardStream, is_complete
from pss_composer.data.augmentation.decoding import BadImage
from pss_composer.seeds import derive_seed
from pss_composer.data.settings import DataSettings
from pss_composer.data.mds.shared_memory import free_when_dropped, taking_a_number
from pss_composer.data.augmentation.transforms import Transform
from pss_composer.errors import InputError, to_line


class StreamingImages(StreamingDataset):
    """An MDS folder of images `x` and labels `y` whose augmentation depends on seed, epoch, index and view alone.

    Args:
        folder: Folder of one split, with its `index.json`; or its cache, for a remote.
        remote: URL of the split's folder in a store, or None.
        settings: How to stream.
        transform: Of a picture and a seed.
        batch_size: Images in the batch of one device: which image goes to which worker depends on it.
        shuffle: A new order in every epoch, else that of the shards.
        seed: Seeds the order and the transform, at least 0.
        repeats: Views of each image that is drawn, in the same batch of the same device wherever they fit.
        on_bad_sample: `raise`, `replace` or `leave_out`, as for `load_sample`.

    Raises:
        InputError: The folder or the remote holds no MDS shards, none with samples, or other columns; or another run
            uses the cache.
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
        if remote is not None and settings.cache_limit is None and is_complete(folder):
            remote = None  # nothing to fetch: any number of runs may read it, without the store
        num_machines = dist.get_world_size() // dist.get_local_world_size()
        stream = ShardStream(folder, remote=remote, download_retry=settings.download_retry)
        with ExitStack() as on_failure:  # a dataset that is refused, but still there, must not keep the cache
            if remote is not None and dist.get_local_rank() == 0:
                self._cache_lock = CacheLock(folder)
                on_failure.callback(self._cache_lock.release)
            stream.get_shards(World.detect(), allow_unsafe_types=False)  # here, for it may wait for the store
            try:
                with taking_a_number():
                    super().__init__(
                        streams=[stream],
                        cache_limit=settings.cache_limit if remote else None,
                        predownload=settings.predownload,
                        # by default `py1s` and `py2s` have 64 per machine, all made equally long by repeating images
                        num_canonical_nodes=settings.num_canonical_nodes or num_machines,
                        batch_size=batch_size,
                        shuffle=shuffle,
                        shuffle_algo=settings.shuffle_algo,
                        shuffle_block_size=settings.shuffle_block_size,
                        shuffle_seed=seed,
                    )
                    self._segments = free_when_dropped(self)
            except InputError:
                raise
            except ValueError as error:  # of a limit that cannot hold the shards it must, and of a cache that is in use
                key = "data.local" if str(error).startswith("Reused") else "data.cache_limit"
                raise InputError(f"{key} must fit: {to_line(error)}") from error
            num_bytes = stream.get_index_size() + max(shard.get_max_size() for shard in self.shards)
            if self.cache_limit and self.cache_limit < num_bytes:  # streaming would find nothing to evict, and hang
                raise InputError(f"data.cache_limit must fit the index and a shard, {num_bytes} bytes, "
                                 f"got {self.cache_limit}")
            on_failure.pop_all()
        self.batching_method = "views"
        self.transform = transform
        self.seed = seed
        self.repeats = repeats
        self.on_bad_sample = on_bad_sample
        self._epoch = 0
        self._views: NDArray[np.int64] | None = None  # of the samples of this worker in this epoch
        self._view = 0
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[Sample]:
        """This worker's samples of the next epoch.

        Raises:
            InputError: A sample, or a shard of it, is broken or cannot be fetched.
        """
        if self._failure is not None:
            raise self._failure
        try:
            yield from super().__iter__()
        finally:
            if hasattr(self, "_iterator"):
                self._iterator.non_blocking_exit()  # else the threads of an epoch that is left early would go on
        # streaming ends the epoch early, without an error, where one of its threads has failed
        if self._failure is not None:
            raise self._failure

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        seed = derive_seed(self.seed, self._epoch, sample_id, self._view)
        return load_sample(
            lambda index: self._load(index, seed, retry),
            sample_id,
            num_samples=self.num_samples,
            on_bad_sample=self.on_bad_sample,
        )

    def _load(self, index: int, seed: int, retry: int) -> tuple[Any, int]:
        shard_id, place = self.spanner[index]
        name = f"sample {place} of {self.shards[shard_id].raw_data.basename} in {self.streams[0].local!r}"
        try:
            with np.errstate(over="ignore"):  # of an offset that is larger than the next one
                sample = super().get_item(index, retry)
            label = int(sample["y"])
        except InputError:
            raise
        except RuntimeError as error:  # a thread has failed, or other workers evict the shard again and again
            message = f"data.cache_limit must leave {name} in the cache while it is read: {to_line(error)}"
            raise self._failure or InputError(message) from error
        except OSError as error:
            raise InputError(f"{name} must be readable, got {to_line(error)!r}") from error
        except (IndexError, ValueError, TypeError, MemoryError) as error:  # offsets or lengths that lead nowhere
            raise BadSample(f"{name} must be whole, got {to_line(error)!r}") from error
        try:
            return self.transform(sample["x"], seed), label
        except BadImage as error:
            raise BadSample(f"{name} must decode, got {str(error)!r}") from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        raw, _ = self.shards[shard_id].file_pairs[0]
        if self._shard_states[shard_id] == _ShardState.LOCAL and (self.streams[0].folder / raw.basename).is_file():
            # streaming would take a lock of all processes for every sample that it looks ahead
            self._shard_access_times[shard_id] = time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except InputError:
            # else other workers would wait for this one for ever
            self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def _prepare_thread(self, it: _Iterator) -> None:
        with self._stopping(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: _Iterator) -> None:
        """Follow the thread that fetches shards, and fetch those that are not there (again).

        streaming's own waits for ever for a shard that another worker evicts, or fails to fetch, at that moment.
        """
        with self._stopping(it):
            while it.ready_index < it.total and not it.should_exit() and not self._event.is_set():
                sample_id = it.sample_ids[it.ready_index]
                shard_id = None if sample_id == -1 else self.spanner[sample_id][0]
                if it.ready_index - it.yield_index > self.predownload:
                    sleep(TICK)
                elif shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                    it.ready_index += 1
                elif self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, blocking=False)
                else:
                    sleep(TICK)
            it.on_exit()

    @contextmanager
    def _stopping(self, it: _Iterator) -> Iterator[None]:
        """Lets an error in a thread stop the others; `__iter__` raises it."""
        try:
            yield
        except Exception as error:
            self._failure = error
            self._event.set()
            it.on_exit()

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        keys = super()._get_work(epoch, sample_in_epoch)
        self._epoch = epoch
        self._views = keys % self.repeats
        return np.where(keys == -1, -1, keys // self.repeats)

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        for sample_id in super()._each_sample_id(it):
            self._view = int(self._views[it.yield_index])
            yield sample_id

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on at a place in the data."""
        super().load_state_dict(obj)
        self._segments.append(self._resume_shm)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The place in the data, as Composer stores it in checkpoints."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # at the end of an epoch Composer's count is back at 0, but streaming still names the epoch that
            # ended, and a resumed run would repeat it
            state["epoch"] = self.next_epoch
        return state


def deal_views(dataset: StreamingImages, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Deal an epoch's images to the workers: streaming's method `random`, with `repeats` views of each image.

    Args:
        dataset: What is dealt.
        world: The machines, devices and workers.
        epoch: Seeds the order.
        sample_in_epoch: Views seen already, which are left out.

    Returns:
        int64 (machines, devices, workers, batches, samples): image × repeats + view, or −1 where there is none.
    """
    repeats, num_parts = dataset.repeats, dataset.num_canonical_nodes
    places = get_partitions(
        dataset.partition_algo, dataset.epoch_size, num_parts, world.num_nodes, world.ranks_per_node,
        world.workers_per_rank, dataset.batch_size, sample_in_epoch, dataset.initial_physical_nodes,
    )
    order = np.arange(dataset.epoch_size)
    if dataset.shuffle:
        order = get_shuffle(dataset.shuffle_algo, dataset.samples_per_shard, num_parts, dataset.shuffle_seed, epoch,
                            dataset.shuffle_block_size)
    if repeats == 1:
        return np.where(places == -1, -1, order[places])
    # streaming deals a machine's batch like cards, one place to each device in turn; here each device gets a run of
    # places, so that it has all views of most of its images, and decodes those once
    batches = np.moveaxis(places, 1, 3)  # (machines, workers, batches, devices, samples)
    whole = (batches != -1).all(axis=(3, 4))
    num_places = world.ranks_per_node * dataset.batch_size
    batches[whole] = np.sort(batches[whole].reshape(-1, num_places)).reshape(batches[whole].shape)
    # the shards are dealt to parts of the epoch, which starts each part anew
    starts = np.arange(num_parts) * dataset.epoch_size // num_parts
    start = starts[np.searchsorted(starts, places, side="right") - 1]
    image, view = order[start + (places - start) // repeats], (places - start) % repeats
    return np.where(places == -1, -1, image * repeats + view)


batching_methods["views"] = deal_views
