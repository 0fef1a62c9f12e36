"""The oracle of surgery: the untouched, full-length model in which no attention sees the dropped tokens."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn import functional

from support.models import FAMILIES


@contextmanager
def hiding_tokens(is_hidden: torch.Tensor):
    """Mask tokens, (B, T) bool, out of every attention over T keys."""
    attention = functional.scaled_dot_product_attention
    mask = torch.zeros(is_hidden.shape).masked_fill(is_hidden, -torch.inf)[:, None, None, :]

    def masked(query, key, value, attn_mask=None, *arguments, **options):
        if key.shape[-2] == is_hidden.shape[1]:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
            attn_mask = mask.expand(-1, -1, query.shape[-2], -1) if attn_mask is None else attn_mask + mask
        return attention(query, key, value, attn_mask, *arguments, **options)

    with patch.object(functional, "scaled_dot_product_attention", masked):
        yield


def masked_logits(name, model, inputs, keep_indices):
    """The untouched model's logits when no token sees the dropped ones, and pooling sees the kept ones alone."""
    family = FAMILIES[name]
    with torch.no_grad():
        num_tokens = family.tokens(model, inputs).shape[1]
    num_prefix = family.num_prefix_tokens
    positions = torch.cat(
        (torch.arange(num_prefix).expand(len(keep_indices), -1), keep_indices + num_prefix), dim=1
    )
    is_hidden = torch.ones(len(keep_indices), num_tokens, dtype=torch.bool).scatter(1, positions, False)
    with hiding_tokens(is_hidden), family.hide(model, is_hidden):
        tokens = family.tokens(model, inputs)
    kept = tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return family.head(model, kept)
