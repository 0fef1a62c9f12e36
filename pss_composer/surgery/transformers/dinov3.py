"""DINOv3 of transformers: the rotary table at the kept tokens."""

from __future__ import annotations

from typing import Any

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import Extension, extend, put, sample_output


def fit_dinov3(vit: Any, sampler: PatchSampler) -> None:
    """The model makes its rotary table once, behind the embeddings, and hands it to every layer."""
    sample_output(sampler, vit.embeddings)
    extend(sampler, vit.rope_embeddings, KeptRotary)
    put(sampler, vit.rope_embeddings, "patch_sampler", sampler)


class KeptRotary(Extension):
    """Cosine and sine, (N, head width) each, at the kept patch tokens: (B, 1, k, head width)."""

    patch_sampler: PatchSampler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cos, sin = super().forward(*args, **kwargs)
        keep_indices = self.patch_sampler.keep_indices
        if keep_indices is None:
            return cos, sin
        return cos[keep_indices].unsqueeze(1), sin[keep_indices].unsqueeze(1)
