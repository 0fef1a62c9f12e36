"""Patch Sampling Schedule (PSS): trains Vision Transformers on a varying share of their patch tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pss_composer.algorithm import PatchSamplingSchedule
    from pss_composer.sampling import PatchSampler
    from pss_composer.surgery import apply_patch_sampling, register_adapter, remove_patch_sampling

__version__ = "0.1.0"

__all__ = ["PatchSampler", "PatchSamplingSchedule", "apply_patch_sampling", "register_adapter",
           "remove_patch_sampling"]


_MODULES = {"PatchSampler": "sampling", "PatchSamplingSchedule": "algorithm", "apply_patch_sampling": "surgery",
            "register_adapter": "surgery", "remove_patch_sampling": "surgery"}


def __getattr__(name: str) -> Any:
    # imported when asked for: the schedules need no torch, and the method no Composer
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
