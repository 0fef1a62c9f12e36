"""Checkpoints of others and of this project: reading them safely, starting from them, handing them to timm."""

from pss_composer.checkpoints.export import export_checkpoint, import_checkpoint
from pss_composer.checkpoints.layouts import read_weights
from pss_composer.checkpoints.reading import LATEST, find_latest
from pss_composer.checkpoints.transfer import load_checkpoint, load_pretrained

__all__ = [
    "LATEST", "export_checkpoint", "find_latest", "import_checkpoint", "load_checkpoint", "load_pretrained",
    "read_weights",
]
