"""Composer's EMA, with what it lacks for Beit and for FSDP2."""

from __future__ import annotations

from composer import algorithms
from composer.algorithms.ema.ema import EMAParameters
from composer.core import Event, State
from composer.loggers import Logger
from torch.distributed.fsdp import FSDPModule


class EMA(algorithms.EMA):
    """Composer's moving average of the weights (its arguments are the same), for every model and parallelism here.

    Composer 0.32 averages integer buffers too and cuts the result, which at some smoothings moves relative position
    indices of timm's `Beit` to their neighbours, so that the averaged model sees the wrong biases. Under FSDP2 it
    mixes sharded with whole parameters, and stops with an error, after an evaluation and after a resumption.
    """

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BEFORE_LOAD or super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves whole parameters behind
        if event == Event.BEFORE_LOAD:
            # FSDP2 has sharded the parameters since INIT: what the checkpoint holds comes sharded as well
            self.ema_model = EMAParameters(state.model)
        else:
            super().apply(event, state, logger)
        buffers = self.ema_model.named_buffers_dict
        self.ema_model.named_buffers_dict = {
            name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()
        }
