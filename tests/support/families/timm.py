"""timm's families."""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos

from support.families.family import Family

SMALL = dict(img_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)


def _family(model_class, num_prefix_tokens=1, *, small=SMALL, row=None, **arguments):
    return Family(
        partial(model_class, **small | arguments),
        num_prefix_tokens,
        **dict(
            tokens=lambda model, images: model.forward_features(images),
            head=lambda model, tokens: model.forward_head(tokens),
            checkpoint=lambda model: model.set_grad_checkpointing(),
        ) | (row or {}),
    )


_eva = partial(_family, Eva, row=dict(has_bias=True), use_rot_pos_emb=True)
_relpos = partial(_family, VisionTransformerRelPos, row=dict(has_bias=True), init_values=0.1)
_naflex = partial(_family, NaFlexVit, small=SMALL | dict(pos_embed_grid_size=(8, 8)), row=dict(has_bias=True))


# NaFlexVit on padded batches

GRIDS = ((8, 8), (4, 9), (3, 4))  # patches of the three images: 64, 36 and 12


def patchify(images, grids=GRIDS, length=64):
    """The top left patches of images of 4 x 4 pixels a patch, padded to a length: what timm's collator returns."""
    batch = dict(patches=torch.full((len(grids), length, 48), 5.0),  # louder than any patch, for samplers by magnitude
                 patch_coord=torch.zeros(len(grids), length, 2, dtype=torch.long),
                 patch_valid=torch.zeros(len(grids), length, dtype=torch.bool))
    for image, (height, width), *rows in zip(images, grids, *batch.values(), strict=True):
        cells = image[:, : 4 * height, : 4 * width].reshape(3, height, 4, width, 4).permute(1, 3, 2, 4, 0)
        coordinates = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        for row, value in zip(rows, (cells.reshape(-1, 48), coordinates, True), strict=True):
            row[: height * width] = value
    return batch


def padded_images(seed=1):
    return patchify(torch.randn(3, 3, 32, 36, generator=torch.Generator().manual_seed(seed)))


def _tokens_and_validity(model, batch):
    features = model.forward_features(**batch)
    validity = features["patch_valid"].unsqueeze(-1).expand(-1, -1, features["patches"].shape[-1])
    prefix = validity.new_ones(len(validity), model.num_prefix_tokens, validity.shape[-1])
    return torch.cat((features["patches"], torch.cat((prefix, validity), dim=1).to(torch.float32)), dim=-1)


def _pool_the_valid(model, tokens):
    tokens, validity = tokens.chunk(2, dim=-1)
    return model.forward_head(tokens, patch_valid=validity[:, model.num_prefix_tokens:, 0] > 0)


PADDED = dict(tokens=_tokens_and_validity, head=_pool_the_valid, inputs=padded_images, has_bias=True)


# Cait: attention is not PyTorch's own, and its class token comes in behind the blocks

def _finish_cait(model, tokens):
    return model.forward_head(model.norm(model.forward_cls(tokens)))


@contextmanager
def _hide_from_talking_heads(cait, is_hidden):
    """Between the heads' scores and after their softmax: (B, query, key, heads)."""
    hidden = is_hidden[:, None, :, None]
    with ExitStack() as stack:
        for block in cait.blocks:
            for layer, value in ((block.attn.proj_l, -torch.inf), (block.attn.proj_w, 0.0)):
                hook = layer.register_forward_hook(
                    lambda layer, inputs, scores, value=value: scores.masked_fill(hidden, value)
                )
                stack.callback(hook.remove)
        yield


CAIT = dict(tokens=lambda model, images: model.blocks(model.pos_drop(model.patch_embed(images) + model.pos_embed)),
            head=_finish_cait, hide=_hide_from_talking_heads)

FAMILIES = {
    "vit": _family(VisionTransformer),
    "vit_avg": _family(VisionTransformer, global_pool="avg"),
    "vit_no_class_token": _family(VisionTransformer, 0, global_pool="avg", class_token=False),
    "vit_no_position": _family(VisionTransformer, pos_embed="none"),
    "vit_any_size": _family(VisionTransformer, dynamic_img_size=True, block_fn=ParallelScalingBlock),
    "vit_differential": _family(VisionTransformer, 1, global_pool="avg", class_token=False, reg_tokens=1,
                                no_embed_class=True, block_fn=DiffParallelScalingBlock),
    "siglip": _family(VisionTransformer, 0, global_pool="map", class_token=False),
    "clip": _family(VisionTransformer, pre_norm=True),
    "registers": _family(VisionTransformer, 5, reg_tokens=4, no_embed_class=True),
    "deit3": _family(VisionTransformer, no_embed_class=True, init_values=1e-1),
    "deit_distilled": _family(VisionTransformerDistilled, 2),
    "beit": _family(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1, row=dict(has_bias=True)),
    "beit_absolute": _family(Beit, use_rel_pos_bias=True, global_pool="token", row=dict(has_bias=True)),
    "beit_shared": _family(Beit, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, row=dict(has_bias=True)),
    "beit_no_bias": _family(Beit, pos_drop_rate=0.1),
    "eva": _family(Eva, use_post_norm=True),
    "eva02": _eva(swiglu_mlp=True, qkv_fused=False, scale_mlp=True, scale_attn_inner=True, ref_feat_shape=(7, 7)),
    "perception_encoder": _eva(global_pool="map", attn_type="rope", use_pre_transformer_norm=True, rope_grid_offset=1.0,
                               rope_grid_indexing="xy"),
    "rope_mixed": _eva(0, attn_type="rope", rope_type="mixed", class_token=False, use_abs_pos_emb=False),
    "dinov3": _eva(5, rope_type="dinov3", rope_rotate_half=True, use_abs_pos_emb=False, num_reg_tokens=4,
                   dynamic_img_size=True, use_fc_norm=False, init_values=0.1, qkv_bias=False),
    "relpos": _relpos(0, fc_norm=True),
    "relpos_swin": _relpos(1, rel_pos_type="mlp-swin", class_token=True, block_fn=ResPostRelPosBlock),
    "relpos_table": _relpos(1, rel_pos_type="bias", class_token=True, global_pool="token"),
    "relpos_shared": _relpos(1, shared_rel_pos=True, class_token=True),
    "relpos_shared_table": _relpos(0, rel_pos_type="bias", shared_rel_pos=True),
    "naflex": _naflex(1, class_token=True, global_pool="token"),
    "naflex_factorized": _naflex(0, pos_embed="factorized", pre_norm=True),
    "naflex_rope": _naflex(2, rope_type="axial", pos_embed="none", reg_tokens=2, global_pool="avg"),
    "naflex_rope_mixed": _naflex(0, rope_type="mixed", pos_embed="none", global_pool="max"),
    "naflex_padded": _naflex(1, row=PADDED, reg_tokens=1, pos_embed_use_grid_sample=True,
                             pos_embed_interp_mode="bilinear"),
    "naflex_padded_mean": _naflex(0, row=PADDED, pos_embed="none", global_pool="avgmax", use_key_only_attn_mask=True),
    "cait": _family(Cait, 0, row=CAIT),
}
