"""Two processes, started through Composer's launcher, against one at the same global batch."""

import json

import distributed_script
import pytest
import torch
from support.distributed_script import MODELS, PARALLELISMS, RESUMED, STOPS
from support.launch import launch

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
    launch("tests/distributed_script.py", str(folder), log=folder / "log.txt")

    def read(case: str) -> list[dict]:
        ranks = [json.loads((folder / case / f"{rank}.json").read_text()) for rank in range(2)]
        for rank, results in enumerate(ranks):
            assert "error" not in results, f"rank {rank}: {results['error']}"
        return ranks

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


@pytest.mark.parametrize("overrides", [
    ["parallelism=fsdp2"], ["parallelism=ddp", "activation_checkpointing=true", "microbatch_size=2"],
], ids=["fsdp2", "ddp"])
def test_a_recipe_on_two_processes_and_its_autoresume(tmp_path, overrides):
    folder = tmp_path / "run"
    command = [
        "train.py", "yamls/deit_small_224_pss.yaml", "data.name=synthetic", "data.path=null", "data.num_workers=0",
        "data.num_samples=16", "model.depth=2", "model.embed_dim=32", "model.num_heads=2", "model.image_size=32",
        "model.patch_size=4", "model.num_classes=10", "train_batch_size=8", "eval_batch_size=8", "max_duration=2ba",
        "scheduler.warmup=1ba", "pss.schedule.cooldown=0ep", "progress_bar=false", "autoresume=true",
        f"save_folder={folder}", *overrides,
    ]
    launch(*command, log=tmp_path / "first.txt")
    metrics = (folder / "metrics.jsonl").read_text()
    batches = [line for line in map(json.loads, metrics.splitlines()) if "pss/keep_rate" in line]
    # of a cycle of two batches, both ends
    assert [line["pss/keep_rate"] for line in batches] == pytest.approx([0.2, 1.0])
    assert [line["pss/tokens"] for line in batches] == [13, 65]
    # the second call finds the run at its end
    launch(*command, log=tmp_path / "second.txt")
    assert (folder / "metrics.jsonl").read_text() == metrics


def test_pretraining_on_two_processes_is_the_same_in_every_parallelism(tmp_path):
    parallelisms = {
        "ddp": ["parallelism=ddp"],
        "fsdp2": ["parallelism=fsdp2"],
        "checkpointing": ["parallelism=fsdp2", "activation_checkpointing=true", "microbatch_size=2"],
    }
    losses, errors = {}, {}
    for name, overrides in parallelisms.items():
        launch(
            "train.py", "yamls/simmim_vitb_pretrain_pss.yaml", "data.name=synthetic", "data.path=null",
            "data.num_workers=0", "data.num_samples=32", "model.depth=2", "model.embed_dim=32", "model.num_heads=2",
            "model.image_size=32", "model.patch_size=4", "model.drop_path=0", "masking.unit=8", "train_batch_size=8",
            "eval_batch_size=8", "max_duration=4ba", "eval_interval=4ba", "scheduler.warmup=1ba", "optimizer.lr=5e-3",
            # torch 2.7 sums FSDP2's gradients over processes where they talk by gloo (by NCCL it averages): Adam does
            # not mind, clipping does
            "gradient_clipping=null", "progress_bar=false", f"save_folder={tmp_path / name}", *overrides,
            log=tmp_path / f"{name}.txt",
        )
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
        errors[name] = [line["metrics/eval/masked_l1"] for line in lines if "metrics/eval/masked_l1" in line]
        assert [line["pss/keep_rate"] for line in lines if "pss/keep_rate" in line] == pytest.approx([0.2, 0.6, 1, 0.6])
        # what one process makes of two processes' checkpoint
        load_checkpoint(SimMIM(build_encoder(ViTShape("tiny", image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=2))),
                        tmp_path / name / "latest-rank0.pt")
    assert len(losses["ddp"]) == 4 and losses["ddp"][3] < losses["ddp"][0]
    for name in ("fsdp2", "checkpointing"):
        assert losses[name] == pytest.approx(losses["ddp"], abs=1e-5)
        assert errors[name] == pytest.approx(errors["ddp"], abs=1e-5) and len(errors[name]) == 1
