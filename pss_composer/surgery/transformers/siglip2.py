"""SigLIP 2 of transformers: patches of images of any shape, padded to one length.

The encoder's mask, the pooling head's and the classifier's come from an argument of the outermost model. So it is
there that patches are embedded and sampled, and the mask with them; the model then finds its tokens embedded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import Extension, extend, put

EMBEDDED = ()  # stands for the shapes of images whose patches are tokens already


def fit_siglip2(model: Any, sampler: PatchSampler) -> None:
    """The image tower, or the classifier around one."""
    tower = model if hasattr(model, "embeddings") else model.vision_model
    extend(sampler, tower.embeddings, EmbedOnce)
    put(sampler, tower.embeddings, "patch_sampler", sampler)
    names = [each.__name__ for each in type(model).__mro__]
    extend(sampler, model, next(extension for name, extension in EXTENSIONS.items() if name in names))


class EmbedOnce(Extension):
    """Embeddings that let through what they have embedded."""

    def forward(self, pixel_values: Tensor, spatial_shapes: Any) -> Any:
        return pixel_values if spatial_shapes is EMBEDDED else super().forward(pixel_values, spatial_shapes)


def embed_and_sample(model: Any, pixel_values: Tensor, mask: Tensor | None, shapes: Any) -> tuple[Any, ...]:
    """The kept tokens (B, k, C), their mask (B, k), and that they are embedded."""
    embeddings = (model if hasattr(model, "embeddings") else model.vision_model).embeddings
    sampler = embeddings.patch_sampler
    tokens = sampler(embeddings(pixel_values, shapes), None if mask is None else mask.bool())
    if mask is not None and sampler.keep_indices is not None:
        mask = mask.gather(1, sampler.keep_indices)
    return tokens, mask, EMBEDDED


# one class for each signature: the Trainer reads a batch's columns from it
class SampledClassifier(Extension):
    """Siglip2ForImageClassification."""

    def forward(self, pixel_values: Any = None, pixel_attention_mask: Any = None, spatial_shapes: Any = None,
                labels: Any = None, **kwargs: Any) -> Any:
        tokens = embed_and_sample(self, pixel_values, pixel_attention_mask, spatial_shapes)
        return super().forward(*tokens, labels=labels, **kwargs)


class SampledModel(Extension):
    """Siglip2VisionModel."""

    def forward(self, pixel_values: Any, pixel_attention_mask: Any, spatial_shapes: Any, **kwargs: Any) -> Any:
        return super().forward(*embed_and_sample(self, pixel_values, pixel_attention_mask, spatial_shapes), **kwargs)


class SampledTower(Extension):
    """Siglip2VisionTransformer of transformers 4.57, inside Siglip2VisionModel and Siglip2Model."""

    def forward(self, pixel_values: Any, attention_mask: Any, spatial_shapes: Any, **kwargs: Any) -> Any:
        return super().forward(*embed_and_sample(self, pixel_values, attention_mask, spatial_shapes), **kwargs)


EXTENSIONS: dict[str, type[Extension]] = {
    "Siglip2ForImageClassification": SampledClassifier,
    "Siglip2VisionModel": SampledModel,
    "Siglip2VisionTransformer": SampledTower,
}
