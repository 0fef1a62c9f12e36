"""ViTs as ComposerModels."""

from pss_composer.models.deit import DeiT
from pss_composer.models.simmim import SimMIM, SimMIMClassifier

__all__ = ["DeiT", "SimMIM", "SimMIMClassifier"]
