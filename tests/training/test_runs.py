"""A run and its folder: one run at a time; what is left when it is stopped or the disk is full; its last lines."""

import logging
import os
import resource
import signal
import sys
import time

import pytest
import torch
from composer import Callback
from support.recipes import read_log, smoke
from support.recipes import train_by_command as main

from pss_composer.training import trainer as training


class At(Callback):
    """Calls a function at the start of a batch."""

    def __init__(self, batch, function):
        self.batch = batch
        self.function = function

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            self.function()


@pytest.fixture
def call_at(monkeypatch):
    """Have a function called in a batch of the runs that follow."""

    def patch(batch, function):
        # called with the trainer right before its fit, and without effect on a fresh run
        monkeypatch.setattr(training, "restore_generators",
                            lambda trainer: trainer.state.callbacks.append(At(batch, function)))

    return patch


@pytest.mark.parametrize("override", ["autoresume=true", "save_overwrite=true"])
def test_a_second_run_in_the_folder_of_one_at_work_is_refused(override, call_at, tmp_path):
    refused = []

    def start_another():
        with pytest.raises(SystemExit) as exit_info:
            main(smoke("deit_small_224_pss", tmp_path / "run", override))
        refused.append(exit_info.value.code)

    call_at(1, start_another)
    main(smoke("deit_small_224_pss", tmp_path / "run"))
    (message,) = refused
    assert message.startswith("error: save_folder must be a folder that nobody else writes to, ")
    assert f"is used by process {os.getpid()} on " in message
    main(smoke("deit_small_224_pss", tmp_path / "run", override))  # the first one is at its end


@pytest.mark.parametrize(("interval", "message"), [
    ("1ba", "run/latest-rank0.pt is the checkpoint ep0-ba1-rank0.pt: the same command with autoresume=true goes on"),
    ("1ep", "there is no checkpoint yet (save_interval=1ep): the same command starts anew"),
])
def test_ctrl_c_says_what_is_saved_and_how_to_go_on(interval, message, call_at, tmp_path, capsys):
    arguments = smoke("deit_small_224_pss", tmp_path / "run", f"save_interval={interval}")
    call_at(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 130
    said = capsys.readouterr().err
    assert f"stopped; {message}" in said.replace(f"{tmp_path}/", "")
    assert (tmp_path / "run").exists() == (interval == "1ba")
    call_at(99, None)
    main([*arguments, "autoresume=true"] if interval == "1ba" else arguments)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_full_disk_leaves_no_half_checkpoint(batch, call_at, tmp_path):
    """A limit on the size of files stands in for the disk's: the first or the second checkpoint does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    call_at(batch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard)))
    try:
        with pytest.raises(SystemExit) as exit_info:
            main(smoke("deit_small_224_pss", tmp_path / "run", "model.embed_dim=64", "model.depth=4"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert exit_info.value.code.startswith("error: save_folder must have room for the run, got ")
    assert "\n" not in exit_info.value.code
    if batch == 0:
        assert not (tmp_path / "run").exists()
    else:
        assert [path.name for path in (tmp_path / "run").glob("ep*")] == ["ep0-ba1-rank0.pt"]
        torch.load(tmp_path / "run" / "latest-rank0.pt", weights_only=False)


@pytest.mark.parametrize(("link", "goes_on_from"), [
    ("ep0-ba1-rank0.pt", 1),
    (None, 1),  # while Composer replaces it
    ("ep0-ba0-rank0.pt", 1),  # leads nowhere
    (None, 0),
])
def test_a_kill_in_the_middle_of_saving_leaves_a_run_that_goes_on(link, goes_on_from, tmp_path):
    arguments = smoke("deit_small_224_pss", tmp_path / "run", "save_num_checkpoints_to_keep=-1")
    main(arguments)
    losses = read_losses(tmp_path / "run")
    (tmp_path / "run" / "latest-rank0.pt").unlink()
    if link is not None:
        (tmp_path / "run" / "latest-rank0.pt").symlink_to(link)
    for batch in range(goes_on_from + 1, 3):
        os.truncate(tmp_path / "run" / f"ep0-ba{batch}-rank0.pt", 10_000)
    main([*arguments, "autoresume=true"])
    assert (tmp_path / "run" / "latest-rank0.pt").resolve().name == "ep0-ba2-rank0.pt"
    # the log goes on, too, with batches after the checkpoint for a second time; without a checkpoint it starts anew
    assert read_losses(tmp_path / "run") == (losses if goes_on_from else []) + losses[goes_on_from:]


def read_losses(folder):
    return [line["loss/train/total"] for line in read_log(folder) if "loss/train/total" in line]


def test_a_period_longer_than_training_deserves_a_word(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pss_composer"):
        main(smoke("deit_small_224_pss", tmp_path / "a"))
        assert not caplog.messages
        main(smoke("deit_small_224_pss", tmp_path / "b", "pss.schedule.period=1000ep"))
    message, = caplog.messages
    assert message == "pss.schedule.period=1000ep is longer than max_duration=2ba: training sees a part of one cycle"


@pytest.mark.parametrize(("recipe", "metric", "command"), [
    ("deit_small_224_pss", "top1 ", "pss evaluate {}"),
    ("simmim_vitb_pretrain", "masked_l1 ", "pss reconstruct {} --out reconstruction.png"),
])
def test_a_run_ends_with_its_result_its_checkpoint_and_the_next_command(recipe, metric, command, tmp_path, capsys):
    main(smoke(recipe, tmp_path / "run"))
    result, checkpoint, following = capsys.readouterr().out.splitlines()[-3:]
    assert result.startswith("evaluation: ") and metric in result
    assert checkpoint == f"checkpoint: {tmp_path}/run/latest-rank0.pt"
    assert following == f"next: {command.format(tmp_path / 'run')}"


def test_under_the_launcher_the_line_of_rank_0_stands_alone(monkeypatch, tmp_path):
    """The launcher ends the other ranks while they wait; a rank that fails alone reports its own mistake."""
    message = "error: seed must be in [0, 2^32), got -1"
    waits = []
    for rank, expected in {"0": message, "1": message, "2": 143}.items():
        monkeypatch.setenv("RANK", rank)  # as the launcher sets it
        monkeypatch.setattr(time, "sleep", lambda seconds, rank=rank: sys.exit(143) if rank == "2" else
                            waits.append(rank))
        with pytest.raises(SystemExit) as exit_info:
            main(smoke("digits_pss", tmp_path / "run", "seed=-1"))
        assert exit_info.value.code == expected
    assert waits == ["1"]
