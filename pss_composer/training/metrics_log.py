"""A log for programs: every metric of a run as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist


class JSONLinesLogger(LoggerDestination):
    """Writes JSON lines: first the settings, then lines with `epoch`, `batch`, `sample` and metrics.

    There is a line for each batch, for each evaluation, and for what Composer logs at the end of an epoch.

    A new run replaces the file, and a resumed run appends to it. If a run was interrupted, the batches after its last
    checkpoint then have two lines; the later one counts.

    Args:
        path: The file; only rank 0 writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._settings: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        self._file: IO[str] | None = None

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        self._settings.update(hyperparameters)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._metrics.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 and self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "w" if state.timestamp.batch == 0 else "a"
            self._file = self.path.open(mode, buffering=1)  # whole lines reach the disk at once
            self._file.write(json.dumps({"settings": self._settings}, default=str) + "\n")

    def batch_end(self, state: State, logger: Logger) -> None:
        self._write_line(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._write_line(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write_line(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._write_line(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._write_line(state)
            self._file.close()
            self._file = None

    def _write_line(self, state: State) -> None:
        if self._file is not None and self._metrics:
            now = {unit: int(getattr(state.timestamp, unit)) for unit in ("epoch", "batch", "sample")}
            self._file.write(json.dumps(now | {name: _to_number(v) for name, v in self._metrics.items()}) + "\n")
        self._metrics = {}


def _to_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
