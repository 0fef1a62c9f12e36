"""timm's ViTs: their slots for a `PatchSampler`, by the names of classes."""

from __future__ import annotations

from typing import Any, cast

from pss_composer.surgery.adapters import Adapter
from pss_composer.surgery.timm.beit import fit_beit
from pss_composer.surgery.timm.naflex import fit_naflex
from pss_composer.surgery.timm.plain import fit_cait, fit_eva, fit_vision_transformer
from pss_composer.surgery.timm.relpos import fit_relpos


def _num_prefix_tokens(vit: Any) -> int:
    return cast(int, vit.num_prefix_tokens)


def _no_prefix_tokens(cait: Any) -> int:
    return 0  # the class token comes in behind the blocks


ADAPTERS = {
    "VisionTransformer": Adapter(fit_vision_transformer, _num_prefix_tokens),
    "VisionTransformerDistilled": Adapter(fit_vision_transformer, _num_prefix_tokens),
    "Eva": Adapter(fit_eva, _num_prefix_tokens),
    "Beit": Adapter(fit_beit, _num_prefix_tokens),
    "VisionTransformerRelPos": Adapter(fit_relpos, _num_prefix_tokens),
    "NaFlexVit": Adapter(fit_naflex, _num_prefix_tokens),
    "Cait": Adapter(fit_cait, _no_prefix_tokens),
}
