"""Composer's EMA, with what it lacks for Beit and for FSDP2."""

from __future__ import annotations

from typing import Any

from composer import algorithms
from composer.core import Event, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(algorithms.EMA):
    """Composer's moving average of the weights, for every model and parallelism here; the arguments are the same.

    Composer 0.32 also averages integer buffers and truncates the result. At some values of `smoothing` this changes the
    relative position indices of timm's `Beit`, and the averaged model uses the wrong biases. Under FSDP2 it fails
    after an evaluation, and in a resumed run every rank gets the averages of rank 0's shards.
    """

    ema_model: Any  # Composer's, None before the average starts

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the parameters unsharded
        if self.ema_model is not None:
            self._shard_averages(state)
        super().apply(event, state, logger)
        buffers = self.ema_model.named_buffers_dict
        self.ema_model.named_buffers_dict = {
            name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()
        }

    def state_dict(self) -> dict[str, Any]:
        state_dict = super().state_dict()
        # Composer saves the state of one rank, so that state must hold the averages of all shards
        parameters = state_dict["ema_model"]["named_parameters_dict"]
        state_dict["ema_model"]["named_parameters_dict"] = {
            name: average.full_tensor() if isinstance(average, DTensor) else average
            for name, average in parameters.items()
        }
        return state_dict

    def _shard_averages(self, state: State) -> None:
        """Shard the averages that are whole, because they were loaded or were copied before FSDP2 sharded the model."""
        averages = self.ema_model.named_parameters_dict
        for name, parameter in state.model.named_parameters():
            if isinstance(parameter, DTensor) and name in averages and not isinstance(averages[name], DTensor):
                averages[name] = distribute_tensor(averages[name], parameter.device_mesh, parameter.placements)
