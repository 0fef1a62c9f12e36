"""Two processes, started through Composer's launcher, against one at the same global batch."""

import json

import pytest
import torch
from support import distributed_script
from support.distributed_script import FINETUNE, MODELS, PARALLELISMS, RESUMED, STOPS, WAYS
from support.launch import launch
from support.paths import ROOT
from support.recipes import train_by_command as main

from pss_composer.checkpoints.layouts import read_weights
from pss_composer.checkpoints.transfer import load_checkpoint
from pss_composer.models.shape import ViTShape
from pss_composer.pretraining.simmim import SimMIM, build_encoder

# of 64 patches and a class token, by hand: 0.2 * 65 = 13, ...
TOKENS = {0.2: 13, 0.4: 26, 0.6: 39, 0.8: 52, 1.0: 65}
# the paper's Cyclic(0.2, 1.0) in 10 batches: drop rates 0.8, 0.62, 0.44, 0.26, 0.08, -0.1, 0.08, ... to fifths
CYCLE = [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of a case on both ranks."""
    folder = tmp_path_factory.mktemp("two_processes")
    launch("tests/support/distributed_script.py", str(folder), log=folder / "log.txt")

    def read(case: str) -> list[dict]:
        ranks = [json.loads((folder / case / f"{rank}.json").read_text()) for rank in range(2)]
        for rank, results in enumerate(ranks):
            assert "error" not in results, f"rank {rank}: {results['error']}"
        return ranks

    read.folder = folder
    return read


@pytest.fixture(scope="module", params=MODELS)
def one_process(request):
    """A model's name, and its results on one process."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param, distributed_script.compare(request.param, "ddp")
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("parallelism", PARALLELISMS)
def test_two_processes_equal_one(one_process, two_processes, parallelism):
    name, expected = one_process
    ranks = two_processes(f"compare-{name}-{parallelism}")
    assert len(expected["losses"]) == 20 and len(expected["eval_losses"]) == 4
    assert expected["eval_losses"][-1] < expected["eval_losses"][0] - 0.05, "the model must have learnt something"
    for results in ranks:
        assert results["keep_rates"] == expected["keep_rates"] == pytest.approx(CYCLE * 2, abs=1e-12)
        assert results["tokens"] == [TOKENS[keep_rate] for keep_rate in CYCLE * 2]
        assert results["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        # evaluated are the averaged weights
        assert results["eval_losses"] == pytest.approx(expected["eval_losses"], abs=1e-5)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("parallelism", RESUMED)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_resume_bit_for_bit(two_processes, name, parallelism, stop):
    num_trained = int(stop.split("-ba")[1])
    for results in two_processes(f"resume-{name}-{parallelism}"):
        straight, resumed = results["straight"], results[stop]
        assert straight["keep_rates"] == pytest.approx(CYCLE * 2, abs=1e-12)
        for key in ("keep_rates", "tokens", "losses"):
            assert resumed[key] == straight[key][num_trained:]
        assert resumed["eval_losses"] == straight["eval_losses"][num_trained // 5:]
        assert resumed["weights"] == straight["weights"]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_one_process_reads_the_shards_of_two(two_processes, name, ema):
    two_processes(f"resume-{name}-fsdp2")
    folder = two_processes.folder
    # the same run wrote its checkpoints as whole files, too
    whole = read_weights(folder / f"checkpoints-{name}-fsdp2_full" / f"{STOPS[0]}-rank0.pt", ema=ema).tensors
    assert (folder / f"checkpoints-{name}-fsdp2" / STOPS[0] / "__1_0.distcp").is_file()
    shards = read_weights(folder / f"checkpoints-{name}-fsdp2" / STOPS[0], ema=ema).tensors
    assert shards.keys() == whole.keys()
    assert all(torch.equal(shards[key], whole[key]) for key in whole)


def check_finetuning(metrics):
    batches = [line for line in map(json.loads, metrics.splitlines()) if "pss/keep_rate" in line]
    # of a cycle of two batches, both ends
    assert [line["pss/keep_rate"] for line in batches] == pytest.approx([0.2, 1.0])
    assert [line["pss/tokens"] for line in batches] == [13, 65]


def test_a_recipe_on_two_processes_and_its_autoresume(two_processes):
    for results in two_processes("finetune-fsdp2"):
        first, second = results["metrics"]
        check_finetuning(first)
        assert second == first  # the second call finds the run at its end


def test_the_command_of_a_recipe_on_two_processes_and_its_autoresume_in_one(tmp_path):
    arguments = ["train.py", *FINETUNE, "activation_checkpointing=true", "microbatch_size=2",
                 f"save_folder={tmp_path / 'run'}"]
    launch(*arguments, log=tmp_path / "log.txt")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    check_finetuning(metrics)
    assert "next: pss evaluate" in (tmp_path / "log.txt").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        main(arguments[1:])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_pretraining_on_two_processes_is_the_same_in_every_parallelism(two_processes):
    losses, errors = {}, {}
    for name in ("ddp", "fsdp2", "checkpointing"):
        results = two_processes(f"pretrain-{name}")[0]
        lines = [json.loads(line) for line in results["metrics"][0].splitlines()]
        losses[name] = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
        errors[name] = [line["metrics/eval/masked_l1"] for line in lines if "metrics/eval/masked_l1" in line]
        assert [line["pss/keep_rate"] for line in lines if "pss/keep_rate" in line] == pytest.approx([0.2, 0.6, 1, 0.6])
        # what one process makes of two processes' checkpoint
        shape = ViTShape("tiny", image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2)
        folder = two_processes.folder / f"run-pretrain-{name}"
        load_checkpoint(SimMIM(build_encoder(shape)), folder / "latest-rank0.pt")
    assert len(losses["ddp"]) == 4 and losses["ddp"][3] < losses["ddp"][0]
    for name in ("fsdp2", "checkpointing"):
        assert losses[name] == pytest.approx(losses["ddp"], abs=1e-5)
        assert errors[name] == pytest.approx(errors["ddp"], abs=1e-5) and len(errors[name]) == 1


@pytest.mark.parametrize("library", ["hf", "torchvision"])
def test_a_librarys_model_on_two_processes_is_the_same_in_every_parallelism(two_processes, library):
    losses, errors = {}, {}
    for way in WAYS:
        lines = [json.loads(line) for line in two_processes(f"{library}-{way}")[0]["metrics"].splitlines()]
        losses[way] = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
        (errors[way],) = (line["metrics/eval/cross_entropy"] for line in lines if "metrics/eval/cross_entropy" in line)
        assert [line["pss/keep_rate"] for line in lines if "pss/keep_rate" in line] == pytest.approx([0.2, 1.0])
    assert len(losses["ddp"]) == 2
    for way in WAYS:
        assert losses[way] == pytest.approx(losses["ddp"], abs=1e-5)
        assert errors[way] == pytest.approx(errors["ddp"], abs=1e-5)
