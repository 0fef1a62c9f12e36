"""The ViTs of Hugging Face transformers, 4.57 and 5: behind the `embeddings` module all of them have their tokens.

Classes are known by name, so that no model of the library is imported for the sake of another.
"""

from __future__ import annotations

from typing import Any

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.adapters import Adapter
from pss_composer.surgery.edits import Extension, extend, put, require_all_tokens, sample_output
from pss_composer.surgery.transformers.beit import fit_beit
from pss_composer.surgery.transformers.dinov3 import fit_dinov3
from pss_composer.surgery.transformers.siglip2 import EXTENSIONS, fit_siglip2


def fit_plain(vit: Any, sampler: PatchSampler) -> None:
    """ViT, DeiT, DINOv2, ViT-MSN, I-JEPA and the image towers of CLIP and SigLIP: no block asks where a token was."""
    sample_output(sampler, find_embeddings(vit))


def fit_whole_grid(model: Any, sampler: PatchSampler) -> None:
    """Backbones, and heads that put tokens onto their grid: they work while every token is kept."""
    embeddings = find_embeddings(model)
    put(sampler, embeddings, "patch_sampler", sampler)
    put(sampler, embeddings, "reason", f"{type(model).__name__} puts all tokens onto their grid")
    extend(sampler, embeddings, AllTokens)


class AllTokens(Extension):
    """Embeddings of a model that needs every token."""

    reason: str

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        require_all_tokens(self, self.reason)
        return super().forward(*args, **kwargs)


def find_embeddings(model: Any) -> Any:
    """The module that makes the tokens, in a ViT or in a model around one."""
    vit = model if hasattr(model, "embeddings") else getattr(model, "vision_model", None) or model.base_model
    return vit.embeddings


def count_prefix_tokens(model: Any) -> int:
    """Class, distillation and register tokens, of which the embeddings have a parameter each."""
    embeddings = find_embeddings(model)
    names = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
    tokens = [getattr(embeddings, name, None) for name in names]
    return sum(int(each.numel() // each.shape[-1]) for each in tokens if each is not None)


PLAIN = (
    "ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "ViTMSNModel", "IJepaModel",
    # until 4.57 a tower is a Transformer inside a Model
    *(f"{library}Vision{part}" for library in ("CLIP", "AltCLIP", "ChineseCLIP", "MetaClip2", "Siglip")
      for part in ("Model", "Transformer")),
)
WHOLE_GRID = (
    "ViTForMaskedImageModeling", "DeiTForMaskedImageModeling", "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation", "Data2VecVisionForSemanticSegmentation",
    "Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone", "BeitBackbone",
)
FITS = {
    **dict.fromkeys(PLAIN, fit_plain),
    **dict.fromkeys(WHOLE_GRID, fit_whole_grid),
    **dict.fromkeys(("BeitModel", "Data2VecVisionModel"), fit_beit),
    **dict.fromkeys(EXTENSIONS, fit_siglip2),
    "DINOv3ViTModel": fit_dinov3,
}
ADAPTERS = {name: Adapter(fit, count_prefix_tokens) for name, fit in FITS.items()}
