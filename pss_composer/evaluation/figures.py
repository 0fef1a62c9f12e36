"""What all pictures share: colours, text that fits, and a place that can be written."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from pss_composer.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, WRONG = "#1f2933", "#7b8794", "#e4e7eb", "#c92a2a"
FONT_SIZE, CHARACTERS_PER_INCH = 9, 12.5  # of a line of text in that size


def prepare_picture(path: Path) -> None:
    """Make the folder of a picture and try to write there, before the work that the picture needs.

    Raises:
        InputError: It cannot be written, or matplotlib is missing.
    """
    make_figure(1, 1)
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()  # os.access would allow root everything
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"must be a place that can be written, got {error.filename!r}: {error.strerror}",
                         key="out") from error


def wrap_text(text: str, inches: float) -> str:
    """The text in lines that are no longer than so many inches."""
    return textwrap.fill(text, int(inches * CHARACTERS_PER_INCH))


def make_figure(width: float, height: float) -> Figure:
    """A figure of that size in inches."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
