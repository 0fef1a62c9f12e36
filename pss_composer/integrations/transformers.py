"""PSS as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pss_composer.callback import ScheduledPatchSampling, read_metrics
from pss_composer.errors import InputError
from pss_composer.progress import Progress
from pss_composer.surgery import find_samplers


class PatchSamplingCallback(ScheduledPatchSampling, TrainerCallback):
    """Trains a `Trainer`'s ViT on a varying share of its patch tokens.

    The arguments are those of `ScheduledPatchSampling`.

    A `PatchSampler` comes into the model when the trainer is built, before the optimizer, DDP and FSDP; when training
    starts, if the callback is added later or `model_init` builds another model. Batches are optimizer steps: all that
    accumulate their gradients share a keep rate. Evaluation and prediction have `eval_keep_rate`.

    Every training loss that is logged comes with `pss/keep_rate` and `pss/tokens`, the tokens of an image that the
    blocks saw: in `state.log_history`, and for the callbacks that stand behind this one.

    When `train` ends, the keep rate of training is 1 again. A `Trainer` has no event for an exception or the end of its
    life: call `remove_patch_sampling(model)` before the model is trained without patch sampling or evaluated elsewhere.

    Nothing is saved: the keep rate follows from the step alone, so a resumed run goes on where it was, and every rank
    has the same keep rate.

    Raises:
        TypeError: When the trainer is built: the model has no supported ViT, or more than one.
        ValueError: A bad argument; when the trainer is built: a second such callback; when training starts: a schedule
            that does not fit its length.

    Example:
        >>> trainer = Trainer(model=model, args=args, callbacks=[PatchSamplingCallback()], ...)
    """

    _metrics: dict[str, float]

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # the trainer tells its callbacks nothing of each other, but hands all of them the same state
        if vars(state).setdefault("_patch_sampling", self) is not self:
            raise InputError("must hold one PatchSamplingCallback, got two", key="callbacks")
        self.apply_to(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_init_end(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.set_keep_rate(kwargs["model"], read_progress(args, state, kwargs["train_dataloader"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._metrics = read_metrics(kwargs["model"])  # now, since an evaluation may come before the log

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            kwargs["logs"].update(self._metrics)
            state.log_history[-1].update(self._metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for patch_sampler in find_samplers(kwargs["model"]):
            patch_sampler.keep_rate = 1.0


def read_progress(args: TrainingArguments, state: TrainerState, loader: Any) -> Progress:
    """Training progress in optimizer steps.

    Args:
        args: The trainer's arguments.
        state: The trainer's state, in training.
        loader: The trainer's data loader.
    """
    accumulation = args.gradient_accumulation_steps
    batch_size = (state.train_batch_size or args.train_batch_size) * args.world_size
    steps_per_epoch = num_samples = None
    with suppress(TypeError, AttributeError):  # data without a length
        steps_per_epoch = math.ceil(len(loader) / accumulation)
        num_samples = min(len(loader.dataset), len(loader) * batch_size)
    return Progress(state.global_step, state.max_steps, steps_per_epoch, batch_size * accumulation, num_samples)
