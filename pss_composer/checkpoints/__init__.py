"""Checkpoints: reading files of any origin safely, starting a model from them, writing weights for timm."""
