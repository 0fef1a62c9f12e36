"""Where the images come from, and how they are read."""

from __future__ import annotations

import difflib
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from pss_composer.checks import find_broken
from pss_composer.errors import InputError

SOURCES = tuple(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name("sources"))]))
ON_BAD_SAMPLE = ("raise", "skip")
SHUFFLE_ALGOS = ("py1e", "py1br", "py1s", "py2s", "naive")
MAX_WORKERS = 1024  # per device
SIZE = re.compile(r"\s*(\d+(\.\d+)?\s*[kmgtpezy]b|\d+b?)\s*", re.IGNORECASE)
# torchvision's data sets for classification, with the arguments that select the split to train on and to evaluate
TORCHVISION_SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS"),
                    ({"train": True}, {"train": False})),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), ({"split": "train"}, {"split": "test"})),
    **dict.fromkeys(("CLEVRClassification", "DTD", "Flowers102", "Imagenette", "PCAM", "RenderedSST2"),
                    ({"split": "train"}, {"split": "val"})),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    "Country211": ({"split": "train"}, {"split": "valid"}),
    "Places365": ({"split": "train-standard"}, {"split": "val"}),
}


def free_on_resume(default: Any) -> Any:
    """A setting that a resumed run may change: it has no part in what the run computes."""
    return field(default=default, metadata={"free_on_resume": True})


@dataclass
class DataSettings:
    """A source of images; the lower half is how `streaming` reads its shards, in streaming's own words.

    Args:
        name: One of `SOURCES`, each a module of `data.sources`.
        path: Folder of the images; what it holds depends on the source.
        num_workers: Processes per device that load images; 0 loads in the main process.
        on_bad_sample: What to do about an image that does not decode: `raise`, or `skip`. Training then sees the next
            image instead, so that batches stay full; evaluation goes on without it. The loader counts and logs them.
        num_samples: Images per split, of `synthetic`.
        dataset: One of `TORCHVISION_SPLITS`, by the name of its class, of `torchvision`.
        download: Let torchvision download the data set into `path` if it is not there.
        remote: Folder of folders of shards, one per split, in a store: `s3://`, `sftp://` and what else streaming
            knows (https://docs.mosaicml.com/projects/streaming). None: the shards are in `path`.
        local: Folder that caches the shards of `remote`, for one run at a time; None: `path`.
        cache_limit: Size of each split's cache, like `100gb`; the shards that were not used for longest make room.
            None: all are kept.
        predownload: Samples that each worker fetches ahead; None: eight batches.
        download_retry: How often a file is asked for before training stops; the waits between double from a second on,
            so 7 outlast a minute without the store.
        shuffle_algo: One of `SHUFFLE_ALGOS`. `py1e` mixes the samples of many shards; `py1s` those of as many shards
            as there are canonical nodes.
        shuffle_block_size: Samples that `py1e` and `py1br` mix; a cache should hold the shards of twice as many.
        num_canonical_nodes: Parts that the shards are divided into; the same number gives the same order on any number
            of machines that divides it. None: the number of machines that training starts on.
    """

    name: str = MISSING
    path: str | None = free_on_resume(None)
    num_workers: int = free_on_resume(8)
    on_bad_sample: str = free_on_resume("raise")
    num_samples: int = 1024
    dataset: str | None = None
    download: bool = free_on_resume(False)

    remote: str | None = free_on_resume(None)
    local: str | None = free_on_resume(None)
    cache_limit: str | None = free_on_resume(None)
    predownload: int | None = free_on_resume(None)
    download_retry: int = free_on_resume(7)
    shuffle_algo: str = "py1e"
    shuffle_block_size: int = 2**18
    num_canonical_nodes: int | None = None

    def check(self) -> list[InputError]:
        """The rules that the settings break; the rest shows when the data are opened."""
        is_remote, is_torchvision = self.remote is not None, self.name == "torchvision"
        return find_broken(
            self,
            ("name", self.name in SOURCES, _must_be_one_of(SOURCES, self.name)),
            ("path", self.path is not None or self.name == "synthetic" or is_remote, "must be a folder"),
            ("local", not is_remote or (self.local or self.path) is not None, "must be a folder that caches remote"),
            ("num_workers", 0 <= self.num_workers <= MAX_WORKERS, f"must be in [0, {MAX_WORKERS}]"),
            ("on_bad_sample", self.on_bad_sample in ON_BAD_SAMPLE, f"must be one of {', '.join(ON_BAD_SAMPLE)}"),
            ("num_samples", self.num_samples >= 1, "must be at least 1"),
            ("dataset", not is_torchvision or self.dataset in TORCHVISION_SPLITS,
             _must_be_one_of(TORCHVISION_SPLITS, self.dataset)),
            ("dataset", is_torchvision or self.dataset is None, "must be null unless name=torchvision"),
            ("download", is_torchvision or not self.download, "must be false unless name=torchvision"),
            ("remote", self.name == "streaming" or not is_remote, "must be null unless name=streaming"),
            ("local", is_remote or self.local is None, "must be null without remote"),
            ("cache_limit", is_remote or self.cache_limit is None, "must be null without remote"),
            ("cache_limit", self.cache_limit is None or SIZE.fullmatch(self.cache_limit) is not None,
             "must be a size like 100gb"),
            ("shuffle_algo", self.shuffle_algo in SHUFFLE_ALGOS, f"must be one of {', '.join(SHUFFLE_ALGOS)}"),
            *((name, getattr(self, name) is None or getattr(self, name) >= 1, "must be at least 1")
              for name in ("predownload", "download_retry", "shuffle_block_size", "num_canonical_nodes")),
        )


def _must_be_one_of(names: Iterable[str], value: str | None) -> str:
    """The rule for a name, with the nearest of those that there are."""
    nearest = difflib.get_close_matches(value or "", names, n=1)
    return f"must be one of {', '.join(names)}" + (f" (did you mean {nearest[0]}?)" if nearest else "")
