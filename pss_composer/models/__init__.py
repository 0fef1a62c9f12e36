"""ViTs for classification as ComposerModels."""
