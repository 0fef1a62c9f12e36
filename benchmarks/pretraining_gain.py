"""What pre-training is worth: `python -m benchmarks.pretraining_gain`.

For each seed: SimMIM pre-training on all tokens and under PSS, then fine-tuning under PSS from each of the two and from
scratch, for the same number of epochs. The table holds top-1 accuracy on held-out images: mean, lowest and highest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from statistics import mean

from benchmarks.step_time import describe_machine, positive_int, print_table
from pss_composer.checkpoints.reading import LATEST
from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.measuring import evaluate_run
from pss_composer.evaluation.runs import load_run, read_metrics, training_seconds
from pss_composer.training.reading import load_recipe
from pss_composer.training.trainer import train

YAMLS = Path(__file__).parent.parent / "yamls"
# how the pre-training differs from digits_pretrain.yaml; None is no pre-training
VARIANTS = {"from scratch": None, "pre-trained": [], "pre-trained under PSS": ["pss.sampler=stratified"]}


def run_recipe(name: str, folder: Path, overrides: list[str]) -> Path:
    """Train a recipe, quietly."""
    settings = [f"save_folder={folder}", f"run_name={folder.name}", "save_overwrite=true", "progress_bar=false"]
    with contextlib.redirect_stdout(io.StringIO()):
        train(load_recipe(YAMLS / f"{name}.yaml", [*settings, *overrides]))
    return folder


def run_chain(variant: str, seed: int, args: argparse.Namespace) -> tuple[dict[float, float], float, float]:
    """Top-1 at each keep rate, the seconds of pre-training, and the held-out reconstruction error after it."""
    folder = args.out / f"{variant.replace(' ', '_')}-{seed}"
    common, seconds, error = [f"seed={seed}", *args.data], 0.0, float("nan")
    pretrained = "null"
    if VARIANTS[variant] is not None:
        overrides = [*common, f"max_duration={args.pretrain_epochs}ep", *VARIANTS[variant]]
        run = run_recipe("digits_pretrain", folder / "pretrain", overrides)
        lines = read_metrics(run)
        seconds = training_seconds(lines)
        error = [line["metrics/eval/masked_l1"] for line in lines if "metrics/eval/masked_l1" in line][-1]
        pretrained = str(run / LATEST)
    overrides = [*common, f"max_duration={args.finetune_epochs}ep", f"model.pretrained={pretrained}"]
    run = load_run(run_recipe("digits_finetune_pss", folder / "finetune", overrides))
    return {rate: metrics["top1"] for rate, metrics in evaluate_run(run).items()}, seconds, error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretraining_gain", description=__doc__)
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0 to this less one")
    parser.add_argument("--pretrain-epochs", type=positive_int, default=100)
    parser.add_argument("--finetune-epochs", type=positive_int, default=20)
    parser.add_argument("--data", nargs="*", default=[], metavar="KEY=VALUE",
                        help="another source for every run: data.name=torchvision data.dataset=FashionMNIST ...")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining_gain"), help="where the runs go")
    args = parser.parse_args()
    args.device, args.threads = "cpu", "all"
    print(describe_machine(args), flush=True)
    results: dict[str, list[tuple[dict[float, float], float, float]]] = {variant: [] for variant in VARIANTS}
    for seed in range(args.seeds):
        for variant, result in results.items():
            result.append(run_chain(variant, seed, args))
            top1, seconds, error = result[-1]
            accuracies = ", ".join(f"{100 * top1[rate]:.1f}" for rate in KEEP_RATES)
            print(f"seed {seed}, {variant}: {accuracies} %; pre-training {seconds:.0f} s, error {error:.3f}",
                  flush=True)
    rows = []
    for rate in KEEP_RATES:
        row = [f"{rate:.1f}"]
        for result in results.values():
            values = [100 * top1[rate] for top1, _, _ in result]
            row.append(f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        rows.append(row)
    seconds = [mean(seconds for _, seconds, _ in result) for result in results.values()]
    rows.append(["pre-training, s", *(f"{value:.0f}" for value in seconds)])
    print()
    print_table(["ρ", *results], rows)


if __name__ == "__main__":
    main()
