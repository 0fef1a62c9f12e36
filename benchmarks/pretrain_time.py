"""What a step of SimMIM pre-training costs under PSS: `python -m benchmarks.pretrain_time`.

A step draws the masks, runs forward and backward, and updates the weights by AdamW. The untouched model on all tokens
and the model under PSS at five keep rates, by each sampler that makes sense here, take turns in every round, in an
order that is shuffled anew. The schedule's time is the mean over its keep rates, each as often as the schedule has it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from statistics import median

import torch
from torch import Tensor

from benchmarks.step_time import NUM_WARMUP_ROUNDS, describe_machine, positive_int, print_table, wait_for
from pss_composer import PatchSampler, apply_patch_sampling
from pss_composer.evaluation import KEEP_RATES
from pss_composer.models.shape import SIZES, ViTShape
from pss_composer.pretraining.masking import draw_masks
from pss_composer.pretraining.simmim import SimMIM, build_encoder
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.schedules import Cyclic, keep_rates

MAX_RATIO = 0.70  # of the dense step, at the schedule's mean keep rate of 0.64; set for ViT-S, 2 CPU threads
SAMPLERS = {"random": "random", "stratified": StratifiedSampler()}


class Learner:
    """A model with its optimizer.

    Args:
        size: The ViT's.
        is_sampled: Whether there is a sampler in it.
        device: Where it is.
    """

    def __init__(self, size: str, is_sampled: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = SimMIM(build_encoder(ViTShape(size, drop_path=0.0))).to(device)
        self.sampler: PatchSampler | None = apply_patch_sampling(self.model) if is_sampled else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.generator = torch.Generator(device).manual_seed(0)

    def time_step(self, images: Tensor) -> float:
        """Seconds of one step."""
        wait_for(images.device)
        start = time.perf_counter()
        batch = images, draw_masks(len(images), self.model.encoder.patch_embed.grid_size, generator=self.generator)
        self.model.loss(self.model(batch), batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait_for(images.device)
        return time.perf_counter() - start


def time_cases(args: argparse.Namespace) -> dict[tuple[str, float], float]:
    """Median seconds of a step for each (sampler or `dense`, keep rate)."""
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, 224, 224, device=device)
    dense, sampled = Learner(args.size, False, device), Learner(args.size, True, device)
    cases = [("dense", 1.0), *((name, rate) for name in SAMPLERS for rate in KEEP_RATES)]
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    shuffler = random.Random(0)
    for num_done in range(NUM_WARMUP_ROUNDS + args.rounds):
        shuffler.shuffle(cases)
        for name, rate in cases:
            if name != "dense":
                sampled.sampler.configure(SAMPLERS[name], keep_rate=rate, eval_keep_rate=1.0)
            elapsed = (dense if name == "dense" else sampled).time_step(images)
            if num_done >= NUM_WARMUP_ROUNDS:
                seconds[name, rate].append(elapsed)
    return {case: median(values) for case, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain_time", description=__doc__.split("\n\n")[1])
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="width, depth and heads of the ViT")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images of 224 px in a step")
    parser.add_argument("--rounds", type=positive_int, default=11, help="turns of every case that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe_machine(args))
    seconds = time_cases(args)

    # the paper's cycle, in an epoch long enough that no keep rate gains by rounding
    shares = Counter(keep_rates(Cyclic(), epochs=1, batches_per_epoch=9000))
    mean_rate = sum(rate * count for rate, count in shares.items()) / shares.total()
    dense = seconds["dense", 1.0]
    print(f"\nSimMIM, {args.size}, batch {args.batch_size}: step time over that of the dense model, medians of "
          f"{args.rounds} rounds; schedule: Cyclic(), mean ρ {mean_rate:.3f}\n")
    rows = [[f"{rate:.1f}", *(f"{seconds[name, rate] / dense:.3f}" for name in SAMPLERS)] for rate in KEEP_RATES]
    schedule = {
        name: sum(seconds[name, rate] * count for rate, count in shares.items()) / shares.total() / dense
        for name in SAMPLERS
    }
    print_table(["ρ", *SAMPLERS], [*rows, ["schedule", *(f"{ratio:.3f}" for ratio in schedule.values())]])
    print(f"\nbar, set for ViT-S and 2 CPU threads: schedule at most {MAX_RATIO:.2f}")
    for name, ratio in schedule.items():
        print(f"{'met    ' if ratio <= MAX_RATIO else 'NOT MET'}  {name}: {ratio:.3f}")


if __name__ == "__main__":
    main()
