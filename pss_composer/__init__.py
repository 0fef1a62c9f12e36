"""Patch Sampling Schedule (PSS): trains Vision Transformers on a varying share of their patch tokens."""

from pss_composer.algorithm import PatchSamplingSchedule
from pss_composer.sampling import PatchSampler
from pss_composer.surgery import apply_patch_sampling

__version__ = "0.1.0"

__all__ = ["PatchSampler", "PatchSamplingSchedule", "apply_patch_sampling"]
