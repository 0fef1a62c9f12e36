"""Finished runs side by side, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.measuring import evaluate_run, flop_shares
from pss_composer.evaluation.runs import Run, read_metrics, select_training, training_seconds


def format_table(runs: Sequence[Run], keep_rates: Sequence[float] = KEEP_RATES) -> str:
    """Top-1 accuracy of each run at each keep rate, the FLOP share of the keep rate, and the cost of training.

    Runs of one architecture share a column of FLOP shares; else each run has its own.

    Args:
        runs: Runs of classifiers.
        keep_rates: Rows of the table.
    """
    logs = [read_metrics(run.folder) for run in runs]
    shares = [flop_shares(run, keep_rates) for run in runs]
    titles = [f"FLOP share of {run.name}" for run in runs]
    if all(share == shares[0] for share in shares):
        titles, shares = ["FLOP share"], shares[:1]
    top1 = [evaluate_run(run, keep_rates) for run in runs]
    rows = [["keep rate", *titles, *(run.name for run in runs)]]
    rows += [
        [str(keep_rate), *(f"{share[keep_rate]:.3f}" for share in shares),
         *(f"{100 * metrics[keep_rate]['top1']:.1f} %" for metrics in top1)]
        for keep_rate in keep_rates
    ]
    before = len(titles) * [""]
    rows.append([*before, "training, s", *(f"{training_seconds(lines):.1f}" for lines in logs)])
    rows.append([*before, "training, FLOP share", *(f"{_mean_flop_share(run, lines):.3f}"
                                                    for run, lines in zip(runs, logs, strict=True))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])


def _mean_flop_share(run: Run, lines: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs of a run's training as a share of training on all tokens."""
    rates = [line.get("pss/keep_rate", 1.0) for line in select_training(lines)]
    shares = flop_shares(run, sorted(set(rates)))
    return sum(shares[rate] for rate in rates) / len(rates)
