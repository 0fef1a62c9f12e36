"""What a training step costs under patch sampling: `python -m benchmarks.step_time`.

Forward and backward of a ViT with `apply_patch_sampling` at five keep rates, against the limit: the untouched model
whose tokens are cut to the same number by a slice, with no sampling at all. All variants take turns in every round,
in an order that is shuffled anew, so that a slow minute of the machine hits all alike; the table holds medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import timm
import torch
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from pss_composer import apply_patch_sampling
from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.measuring import count_flops
from pss_composer.models.shape import SIZES, ViTShape
from pss_composer.sampling import num_keep

NUM_CLASSES = 1000
NUM_WARMUP_ROUNDS = 3
# at most this multiple of the limit at every keep rate; set for ViT-S at 224 px, batch 8, 2 CPU threads
MAX_RATIO = {"deit": 1.10, "simmim": 1.20}
MAX_OVERHEAD_AT_ONE = 0.02
TITLES = {"deit": "DeiT", "simmim": "SimMIM ViT"}


class FirstTokens(nn.Module):
    """The limit's stand-in for a sampler: the first tokens, by a slice."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, : self.num_tokens]


class Case(NamedTuple):
    """One thing to time.

    Args:
        variant: `untouched`, `pss`, `limit` or `limit without bias`.
        keep_rate: Share of the tokens kept, in (0, 1].
        model: The ViT; cases of a variant share it.
        prepare: Sets the model to the keep rate, outside the timing.
    """

    variant: str
    keep_rate: float
    model: nn.Module
    prepare: Callable[[], None]


def build_vit(name: str, size: str, image_size: int, *, has_bias: bool = True) -> nn.Module:
    """The plain timm ViT behind `DeiT` or `SimMIMClassifier`, without stochastic depth, in training mode."""
    arguments = ViTShape(size, image_size=image_size, num_classes=NUM_CLASSES, drop_path=0.0).to_timm()
    if name == "deit":
        return VisionTransformer(**arguments)
    return Beit(**arguments, use_abs_pos_emb=False, use_rel_pos_bias=has_bias, init_values=0.1, global_pool="avg")


def count_tokens(vit: nn.Module, keep_rate: float) -> int:
    """Tokens in the blocks at a keep rate, prefix included."""
    num_prefix_tokens = vit.num_prefix_tokens
    return num_prefix_tokens + num_keep(keep_rate, vit.patch_embed.num_patches, num_prefix_tokens)


def cut_tokens(vit: nn.Module, num_tokens: int) -> None:
    """Make a plain ViT the limit: only its first tokens reach the blocks, and its biases are those of these tokens."""
    cut = FirstTokens(num_tokens)
    if isinstance(vit, VisionTransformer):
        vit.patch_drop = cut
        return
    vit.pos_drop = cut
    for block in vit.blocks:
        attention = block.attn
        if attention.relative_position_bias_table is not None:
            index = gen_relative_position_index(vit.patch_embed.grid_size, device=attention.qkv.weight.device)
            attention.relative_position_index = index[:num_tokens, :num_tokens].contiguous()
            # Beit shapes the bias by the area of its window, here a row of the kept patches
            attention.window_size = (num_tokens - 1, 1)


def list_cases(name: str, size: str, image_size: int, device: torch.device) -> list[Case]:
    """Every variant of a model at every keep rate."""
    cases = []

    untouched = build_vit(name, size, image_size).to(device)
    cases.append(Case("untouched", 1.0, untouched, lambda: None))

    sampled = build_vit(name, size, image_size).to(device)
    sampler = apply_patch_sampling(sampled, sampler="magnitude")
    for keep_rate in KEEP_RATES:
        cases.append(Case("pss", keep_rate, sampled, lambda rate=keep_rate: setattr(sampler, "keep_rate", rate)))

    for variant in ("limit", "limit without bias")[: 2 if name == "simmim" else 1]:
        vit = build_vit(name, size, image_size, has_bias=variant == "limit").to(device)
        for keep_rate in KEEP_RATES:
            num_tokens = count_tokens(vit, keep_rate)
            cases.append(Case(variant, keep_rate, vit, lambda vit=vit, T=num_tokens: cut_tokens(vit, T)))
    return cases


def run_step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    cross_entropy(model(images), labels).backward()


def time_step(case: Case, images: Tensor, labels: Tensor) -> float:
    """Seconds of one step; the gradients are allocated anew in it and freed behind it."""
    case.prepare()
    wait_for(images.device)
    start = time.perf_counter()
    run_step(case.model, images, labels)
    wait_for(images.device)
    seconds = time.perf_counter() - start
    case.model.zero_grad(set_to_none=True)
    return seconds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_cases(cases: list[Case], images: Tensor, labels: Tensor, num_rounds: int) -> dict[tuple[str, float], float]:
    """Median seconds of a step for each (variant, keep rate), from rounds in which every case has one turn."""
    seconds = {(case.variant, case.keep_rate): [] for case in cases}
    order, shuffler = list(cases), random.Random(0)
    for num_done in range(NUM_WARMUP_ROUNDS + num_rounds):
        shuffler.shuffle(order)
        for case in order:
            elapsed = time_step(case, images, labels)
            if num_done >= NUM_WARMUP_ROUNDS:
                seconds[case.variant, case.keep_rate].append(elapsed)
    return {key: median(values) for key, values in seconds.items()}


def measure_memory(case: Case, images: Tensor, labels: Tensor) -> int:
    """Bytes that a step adds to the weights: the peak on CUDA, on the CPU the tensors saved for the backward pass."""
    case.prepare()
    if images.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_step(case.model, images, labels)
        num_bytes = torch.cuda.max_memory_allocated() - before
        case.model.zero_grad(set_to_none=True)
        return num_bytes

    weights = {tensor.untyped_storage().data_ptr() for tensor in case.model.parameters()}
    bytes_saved = {}  # by storage: what several operations save counts once

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            bytes_saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        # while the loss lives so do the saved tensors, and no address is used twice
        _loss = cross_entropy(case.model(images), labels)
    return sum(bytes_saved.values())


def benchmark_model(name: str, args: argparse.Namespace) -> None:
    """Measure one model and print its table and bars."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=device)
    cases = list_cases(name, args.size, args.image_size, device)

    load_before = os.getloadavg()[0]
    seconds = time_cases(cases, images, labels, args.rounds)
    load_after = os.getloadavg()[0]
    pss_cases = [case for case in cases if case.variant == "pss"]
    memory = {case.keep_rate: measure_memory(case, images, labels) for case in pss_cases}
    flops = {}
    for case in pss_cases:
        case.prepare()
        flops[case.keep_rate] = count_flops(case.model, images[:1])

    print(f"\n{TITLES[name]}, {args.size}, {args.image_size} px, batch {args.batch_size}: medians of {args.rounds} "
          f"rounds; load average {load_before:.1f} before, {load_after:.1f} after\n")
    variants = list(dict.fromkeys(case.variant for case in cases if case.variant != "untouched"))
    header = ["ρ", "tokens", *(f"pss / {variant}" for variant in variants if variant != "pss"),
              *(f"{variant}, of its ρ = 1" for variant in variants), "FLOPs", "memory", "MiB"]
    if args.milliseconds:
        header += [f"{variant}, ms" for variant in variants]
    rows = []
    for rate in KEEP_RATES:
        pss = seconds["pss", rate]
        row = [f"{rate:.1f}", str(count_tokens(pss_cases[0].model, rate))]
        row += [f"{pss / seconds[variant, rate]:.3f}" for variant in variants if variant != "pss"]
        row += [f"{seconds[variant, rate] / seconds[variant, 1.0]:.3f}" for variant in variants]
        row += [f"{flops[rate] / flops[1.0]:.3f}", f"{memory[rate] / memory[1.0]:.3f}", f"{memory[rate] / 2**20:.0f}"]
        if args.milliseconds:
            row += [f"{1000 * seconds[variant, rate]:.1f}" for variant in variants]
        rows.append(row)
    print_table(header, rows)
    if args.milliseconds:
        print("\nms: this machine, for orientation only")
    print_bars(name, seconds, memory)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table with columns flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    dashes = ["-" * (width - 1) + ":" for width in widths]
    for row in [header, dashes, *rows]:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def print_bars(name: str, seconds: dict[tuple[str, float], float], memory: dict[float, int]) -> None:
    """Whether this run met what the code is held to."""
    print("\nbars, set for ViT-S at 224 px, batch 8, 2 CPU threads:")
    for text, is_met in list_bars(name, seconds, memory):
        print(f"{'met    ' if is_met else 'NOT MET'}  {text}")
    # two runs of the same work: how far a ratio of this run may be off
    noise = seconds["limit", 1.0] / seconds["untouched", 1.0]
    print(f"noise    at ρ = 1 the limit is the untouched model: ratio {noise:.3f}")
    if abs(noise - 1) > MAX_OVERHEAD_AT_ONE:
        print("         the machine was too busy for this run to judge the bars for time")


def list_bars(
    name: str, seconds: dict[tuple[str, float], float], memory: dict[float, int]
) -> Iterator[tuple[str, bool]]:
    """Each bar in words, with this run's figure, and whether it is met."""
    ratio, rate = max((seconds["pss", rate] / seconds["limit", rate], rate) for rate in KEEP_RATES)
    yield (f"pss / limit at most {MAX_RATIO[name]:.2f} at every ρ: at worst {ratio:.3f}, at ρ = {rate}",
           ratio <= MAX_RATIO[name])
    ratio = seconds["pss", 1.0] / seconds["untouched", 1.0]
    yield (f"at ρ = 1 within {MAX_OVERHEAD_AT_ONE:.0%} of the untouched model: ratio {ratio:.3f}",
           abs(ratio - 1) <= MAX_OVERHEAD_AT_ONE)
    falls = all(memory[less] < memory[more] for more, less in pairwise(KEEP_RATES))
    yield "memory falls with ρ", falls


def describe_machine(args: argparse.Namespace) -> str:
    """Where this runs, and on which versions."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    machine = f"{processor}, {os.cpu_count()} cores, {args.threads} threads"
    if args.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; {machine}"
    return f"{machine}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


def positive_int(text: str) -> int:
    """An argparse type: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with a line that says why."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", description=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", choices=("deit", "simmim", "all"), default="all", help="which ViT")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="width, depth and heads of the ViT")
    parser.add_argument("--image-size", type=positive_int, default=224, help="pixels, a multiple of 16")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images in a step")
    parser.add_argument("--rounds", type=positive_int, default=11, help="turns of every variant that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    parser.add_argument("--milliseconds", action=argparse.BooleanOptionalAction, default=None,
                        help="print absolute times too (default: on CUDA only)")
    args = parser.parse_args(arguments)
    if args.image_size % 16:
        parser.error(f"argument --image-size: must be a multiple of 16, got {args.image_size}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda asks for a GPU, and torch finds none")
    if args.milliseconds is None:
        args.milliseconds = args.device == "cuda"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    print(describe_machine(args))
    for name in MAX_RATIO if args.model == "all" else (args.model,):
        benchmark_model(name, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
