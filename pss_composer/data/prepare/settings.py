"""How images become shards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pss_composer.checks import find_broken
from pss_composer.errors import InputError

UNITS = {"b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}
MAX_SHARD_SIZE = 2**30  # bytes of source files; MDS has 32-bit offsets, and a resized image may be larger than its file


@dataclass(frozen=True)
class ConversionSettings:
    """Options of `convert_images`; its docstring explains them."""

    shortest_side: int | None
    quality: int
    shard_size: str | int
    num_workers: int
    is_strict: bool

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes; 0 if it is not a size, which `check` then reports."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?b)?", str(self.shard_size).strip().lower())
        return int(float(match[1]) * UNITS.get(match[2], 1)) if match else 0

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        return find_broken(
            self,
            ("shortest_side", self.shortest_side is None or self.shortest_side >= 1, "must be at least 1 pixel"),
            ("quality", 1 <= self.quality <= 100, "must be in [1, 100]"),
            ("shard_size", 1 <= self.shard_bytes <= MAX_SHARD_SIZE, "must be a size like 64mb, in [1, 1gb]"),
            ("num_workers", self.num_workers >= 1, "must be at least 1"),
        )
