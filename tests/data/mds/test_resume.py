"""A run that was killed goes on bit for bit."""

import os
import shutil
import signal

import pytest
import torch
from support.jobs import RECIPE, Job, assert_one_line, rank_environments, read_labels, wait_for_labels, wait_well


def load_weights(folder):
    return torch.load(folder / "run" / "latest-rank0.pt", weights_only=False)["state"]["model"]


def assert_same_weights(folder, expected):
    weights, expected = load_weights(folder), load_weights(expected)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def killed(server, s3, tmp_path_factory):
    """Folders of runs on one rank and on two that were killed in their second epoch, after seven batches."""
    folders = []
    for num_ranks in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"killed-{num_ranks}"))
        arguments = [*RECIPE, "data.remote=s3://bucket/set", f"data.local={folders[-1]}/cache", "data.num_workers=2",
                     f"save_folder={folders[-1]}/run", "save_interval=3ba"]
        jobs = [Job(server, folders[-1] / f"log-{rank}.txt", "train", [str(folders[-1]), arguments, 7], s3 | ranks)
                for rank, ranks in enumerate(rank_environments(num_ranks))]
        for rank in range(num_ranks):
            wait_for_labels(folders[-1] / f"labels-{rank}.jsonl", 8)
        for job in jobs:
            job.kill()
        for job in jobs:
            assert job.wait()[0] == -signal.SIGKILL
    return folders


def resume(train, s3, killed, folder, *overrides, num_ranks=1):
    """Goes on with a copy of a run that was killed, from the store and an empty cache."""
    folder.mkdir()
    shutil.copytree(killed / "run", folder / "run")
    text = (folder / "run" / "recipe.yaml").read_text()
    (folder / "run" / "recipe.yaml").write_text(text.replace(str(killed), str(folder)))
    jobs = train(folder, "data.remote=s3://bucket/set", f"data.local={folder}/cache", "save_interval=3ba",
                 "autoresume=true", *overrides, environment=s3, num_ranks=num_ranks)
    wait_well(*(jobs if num_ranks > 1 else [jobs]))
    assert (folder / "cache" / "train" / "index.json").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(num_workers, killed, straight, s3, train, tmp_path):
    resume(train, s3, killed[0], tmp_path / "run", f"data.num_workers={num_workers}")
    assert read_labels(tmp_path / "run") == read_labels(straight)[6:]
    assert_same_weights(tmp_path / "run", straight)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_goes_on_on_other_ranks(num_ranks, killed, straight, s3, train, tmp_path):
    expected = read_labels(straight)
    assert read_labels(killed[2 - num_ranks], 3 - num_ranks) == expected[:8]
    resume(train, s3, killed[2 - num_ranks], tmp_path / "run", num_ranks=num_ranks)
    assert read_labels(tmp_path / "run", num_ranks) == expected[6:]


def test_a_killed_worker_is_one_line_and_the_run_goes_on(s3, train, straight, tmp_path):
    arguments = ["data.remote=s3://bucket/set", f"data.local={tmp_path}/cache", "data.num_workers=2",
                 "save_interval=3ba"]
    job = train(tmp_path, *arguments, environment=s3, pause_at=7)
    wait_for_labels(tmp_path / "labels-0.jsonl", 8)
    assert read_labels(tmp_path) == read_labels(straight)[:8]
    os.kill(job.find_workers()[-1], signal.SIGKILL)
    assert_one_line(job, "data.num_workers must be processes that stay alive, but a DataLoader worker")
    wait_well(train(tmp_path, *arguments, "autoresume=true", environment=s3))
    assert read_labels(tmp_path) == read_labels(straight)[6:]
    assert_same_weights(tmp_path, straight)
