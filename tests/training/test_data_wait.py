"""Where a step's time goes, and the sentence about a loader that limits a run."""

import re
import time

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pss_composer.training import data_wait
from pss_composer.training.data_wait import DataWaitMonitor


class Slow(DataLoader):
    """Takes its time for each batch, and to start with."""

    start = seconds = 0.0

    def __iter__(self):
        time.sleep(self.start)
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


class Busy(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return self.linear(images)


def fit(monkeypatch, *, start=0.0, seconds=0.0, compute=0.03):
    """The metrics of three epochs, and their time, with a slow loader of twelve batches."""
    monkeypatch.setattr(data_wait, "WINDOW", 10)
    model, logger = ComposerClassifier(Busy(compute), num_classes=2), InMemoryLogger()
    loader = Slow(TensorDataset(torch.zeros(12, 4), torch.zeros(12, dtype=torch.int64)), batch_size=1)
    loader.start, loader.seconds = start, seconds
    trainer = Trainer(model=model, train_dataloader=loader, max_duration="3ep", loggers=logger, device="cpu",
                      optimizers=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=DataWaitMonitor(),
                      progress_bar=False)
    begin = time.perf_counter()
    trainer.fit()
    duration = time.perf_counter() - begin
    trainer.close()
    return {name: [value for _, value in logger.data[f"loader/{name}"]] for name in ("wait_s", "compute_s")}, duration


def test_a_slow_loader_is_named_once_with_its_figures(monkeypatch, capsys):
    metrics, duration = fit(monkeypatch, start=0.1, seconds=0.02)
    line, = [line for line in capsys.readouterr().out.splitlines() if "data loader limits" in line]
    assert len(metrics["wait_s"]) == len(metrics["compute_s"]) == 36
    assert all(wait >= 0.02 for wait in metrics["wait_s"]) and all(compute >= 0.03 for compute in metrics["compute_s"])
    assert 0.9 * duration < sum(metrics["wait_s"] + metrics["compute_s"]) <= duration
    # of the first ten steps but the very first
    assert metrics["wait_s"][0] >= 0.12
    wait, compute = (sum(metrics[name][1:11]) / 10 for name in ("wait_s", "compute_s"))
    figures = [float(figure) for figure in re.findall(r"\d+\.\d+|\d+(?=%)", line)]
    assert figures == pytest.approx([wait, compute, 100 * wait / (wait + compute), (wait + compute) / compute],
                                    abs=0.51, rel=1e-3)
    assert figures[:2] == pytest.approx([wait, compute], abs=6e-4)
    assert "last 10 steps" in line and "data.num_workers, now 0" in line


def test_a_fast_loader_is_never_named(monkeypatch, capsys):
    metrics, _ = fit(monkeypatch, compute=0.1)
    assert "data loader" not in capsys.readouterr().out
    assert len(metrics["wait_s"]) == 36


def test_the_first_step_of_an_epoch_does_not_count(monkeypatch, capsys):
    metrics, _ = fit(monkeypatch, start=0.1, compute=0.1)
    assert [wait > 0.1 for wait in metrics["wait_s"]] == ([True] + [False] * 11) * 3
    assert "data loader" not in capsys.readouterr().out
