"""Names of weights for the account of what was loaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable


def count_names(names: Iterable[str]) -> str:
    """Names of weights as one line; those that differ in the number of their block alone stand there once."""
    counts = Counter(re.sub(r"(blocks|layers?)\.(encoder_layer_)?\d+", r"\1.*", name) for name in names)
    return ", ".join(f"{name} ({count} x)" if count > 1 else name for name, count in counts.items())
