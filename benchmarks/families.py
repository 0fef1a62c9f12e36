"""What a training step costs under patch sampling in four libraries' ViTs: `python -m benchmarks.families`.

Forward and backward of DINOv2-S and DINOv3-S of timm, and of ViT-S of transformers and torchvision, with
`apply_patch_sampling` at ρ = 0.6 and 0.2, against the limit: the untouched model whose tokens are cut to the same
number by a slice, with no sampling at all. A second limit shows the noise. The method is that of `step_time`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from benchmarks.step_time import (
    NUM_CLASSES,
    Case,
    FirstTokens,
    describe_machine,
    positive_int,
    print_table,
    time_cases,
)
from pss_composer import apply_patch_sampling
from pss_composer.models.shape import SIZES
from pss_composer.sampling import num_keep

IMAGE_SIZE = 224
KEEP_RATES = (0.6, 0.2)
MAX_RATIO = 1.05
MAX_NOISE = 0.02
WIDTH, DEPTH, NUM_HEADS = SIZES["small"].values()


class Logits(nn.Module):
    """A classifier of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


class FirstTokensAndNoIndices(FirstTokens):
    """The limit's stand-in in timm's Eva, which asks for the indices of the kept tokens."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return super().forward(tokens), None


class FirstPositions(nn.Module):
    """The first rows of a rotary table.

    Args:
        rope: timm's table.
        num_patches: How many rows.
    """

    feat_shape = None  # timm asks only whether it is there

    def __init__(self, rope: Any, num_patches: int) -> None:
        super().__init__()
        self.rope, self.num_patches = rope, num_patches

    def get_embed(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.rope.get_embed(*args, **kwargs)[: self.num_patches]


def build_timm(name: str) -> nn.Module:
    return timm.create_model(name, img_size=IMAGE_SIZE, num_classes=NUM_CLASSES)


def build_transformers() -> nn.Module:
    config = transformers.ViTConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=NUM_HEADS,
                                    intermediate_size=4 * WIDTH, image_size=IMAGE_SIZE, num_labels=NUM_CLASSES)
    return Logits(transformers.ViTForImageClassification(config))


def build_torchvision() -> nn.Module:
    return VisionTransformer(image_size=IMAGE_SIZE, patch_size=16, num_layers=DEPTH, num_heads=NUM_HEADS,
                             hidden_dim=WIDTH, mlp_dim=4 * WIDTH, num_classes=NUM_CLASSES)


def cut_timm(vit: Any, num_tokens: int) -> None:
    vit.patch_drop = FirstTokens(num_tokens)


def cut_eva(vit: Any, num_tokens: int) -> None:
    vit.patch_drop = FirstTokensAndNoIndices(num_tokens)
    rope = vit.rope.rope if isinstance(vit.rope, FirstPositions) else vit.rope
    vit.rope = FirstPositions(rope, num_tokens - vit.num_prefix_tokens)


def cut_transformers(vit: Any, num_tokens: int) -> None:
    vit.model.vit.embeddings.dropout = FirstTokens(num_tokens)


def cut_torchvision(vit: Any, num_tokens: int) -> None:
    vit.encoder.dropout = FirstTokens(num_tokens)


# title, how to build it, how to make it the limit, patch tokens
MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[Any, int], None], int]] = {
    "dinov2": ("DINOv2-S, timm", lambda: build_timm("vit_small_patch14_dinov2"), cut_timm, 256),
    "dinov3": ("DINOv3-S, timm", lambda: build_timm("vit_small_patch16_dinov3"), cut_eva, 196),
    "transformers": ("ViT-S, transformers", build_transformers, cut_transformers, 196),
    "torchvision": ("ViT-S, torchvision", build_torchvision, cut_torchvision, 196),
}


def list_cases(name: str, device: torch.device) -> tuple[list[Case], dict[float, int]]:
    """Every variant of a model at every keep rate, and the tokens at every keep rate."""
    _, build, cut, num_patches = MODELS[name]
    sampled = build().to(device).train()
    sampler = apply_patch_sampling(sampled)
    num_prefix_tokens = sampler.num_prefix_tokens
    num_tokens = {rate: num_prefix_tokens + num_keep(rate, num_patches, num_prefix_tokens) for rate in KEEP_RATES}
    cases = [Case("pss", rate, sampled, lambda rate=rate: setattr(sampler, "keep_rate", rate)) for rate in KEEP_RATES]
    for variant in ("limit", "limit again"):
        vit = build().to(device).train()
        for rate in KEEP_RATES:
            cases.append(Case(variant, rate, vit, lambda vit=vit, T=num_tokens[rate]: cut(vit, T)))
    return cases, num_tokens


def check_tokens(case: Case, num_tokens: int, images: Tensor) -> None:
    """Fail unless every block sees as many tokens as it should."""
    case.prepare()
    counts: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].shape[1]))
             for module in case.model.modules() if getattr(module, "out_features", 0) == 4 * WIDTH]
    with torch.no_grad():
        case.model(images[:1])
    for hook in hooks:
        hook.remove()
    assert counts == [num_tokens] * DEPTH, (case.variant, case.keep_rate, counts)


def benchmark_model(name: str, args: argparse.Namespace) -> list[list[str]]:
    """Measure one model; the rows of its table."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    cases, num_tokens = list_cases(name, device)
    for case in cases:
        check_tokens(case, num_tokens[case.keep_rate], images)
    seconds = time_cases(cases, images, labels, args.rounds)
    rows = []
    for rate in KEEP_RATES:
        limit = seconds["limit", rate]
        ratio, noise = seconds["pss", rate] / limit, seconds["limit again", rate] / limit
        verdict = "too noisy" if abs(noise - 1) > MAX_NOISE else "met" if ratio <= MAX_RATIO else "NOT MET"
        rows.append([MODELS[name][0], f"{rate:.1f}", str(num_tokens[rate]), f"{ratio:.3f}", f"{noise:.3f}", verdict])
    return rows


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all", help="which ViT")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images in a step")
    parser.add_argument("--rounds", type=positive_int, default=21, help="turns of every variant that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda asks for a GPU, and torch finds none")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    print(f"{describe_machine(args)}, transformers {transformers.__version__}, torchvision {torchvision.__version__}")
    load_before = os.getloadavg()[0]
    names = MODELS if args.model == "all" else (args.model,)
    rows = [row for name in names for row in benchmark_model(name, args)]
    print(f"\n{IMAGE_SIZE} px, batch {args.batch_size}: medians of {args.rounds} rounds; load average "
          f"{load_before:.1f} before, {os.getloadavg()[0]:.1f} after. The bar: pss / limit at most {MAX_RATIO}\n")
    print_table(["model", "ρ", "tokens", "pss / limit", "limit / limit", "bar"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
