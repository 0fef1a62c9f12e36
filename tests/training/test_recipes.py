"""Every recipe trains, every setting has its effect, and bad input ends in one line with nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Callback
from composer.algorithms import GradientClipping, LabelSmoothing
from omegaconf import OmegaConf
from support.paths import ROOT, YAMLS
from support.recipes import SMOKE, read_log, smoke
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from pss_composer import training
from pss_composer.data.sources.digits import write_images
from pss_composer.errors import InputError
from pss_composer.schedules import Cyclic, Fixed, Linear
from pss_composer.training.ema import EMA
from pss_composer.training.mixing import MixUpCutMix
from pss_composer.training.optim import build_optimizer
from pss_composer.training.reading import load_recipe
from pss_composer.training.trainer import build_algorithms, build_model, build_trainer, main, train

RECIPES = sorted(YAMLS.glob("*.yaml"))


def test_all_recipes_are_there():
    assert [path.stem for path in RECIPES] == [
        "deit_small_224", "deit_small_224_pss", "deit_small_384", "deit_small_384_pss", "deit_small_rpb_224_pss",
        "deit_small_rpb_384_pss", "digits", "digits_finetune_pss", "digits_pretrain", "digits_pss", "simmim_vitb",
        "simmim_vitb_pretrain", "simmim_vitb_pretrain_pss", "simmim_vitb_pss",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_trains(path, tmp_path):
    main(smoke(path.stem, tmp_path))
    lines = read_log(tmp_path)
    losses = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    is_pretraining = "_pretrain" in path.stem
    metrics = ("masked_l1",) if is_pretraining else ("top1", "top5")
    assert any(all(f"metrics/eval/{metric}" in line for metric in metrics) for line in lines)
    rates = [line["pss/keep_rate"] for line in lines if "pss/keep_rate" in line]
    # two batches an epoch: the first at the start of the cycle, the second in its middle
    assert rates == ([0.2, 1.0] if path.stem.endswith("_pss") else [])
    assert (tmp_path / "latest-rank0.pt").exists() and (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("name", ["deit_small_224", "deit_small_384", "digits", "simmim_vitb_pretrain"])
def test_a_pair_of_recipes_differs_in_its_pss_block_alone(name):
    plain, pss = (OmegaConf.to_container(OmegaConf.load(ROOT / "yamls" / f"{name}{end}.yaml")) for end in ("", "_pss"))
    assert pss.pop("pss") and pss == plain


def test_recipes_say_paper_expected_result_and_command():
    for path in RECIPES:
        header = path.read_text().split("\n\n")[0]
        assert f"composer train.py yamls/{path.name}" in header
        assert "Expected:" in header and ("the paper's" in header or "measured here" in header or
                                          "not measured" in header or "ot trained here yet" in header
                                          or "not known" in header), path.name


# --- the settings reach what they are for --------------------------------------------------------------------------


def recipe(name, *overrides):
    return load_recipe(ROOT / "yamls" / f"{name}.yaml", overrides)


def test_learning_rates_of_the_papers_recipes():
    simmim = recipe("simmim_vitb_pss", *SMOKE[7:13], "train_batch_size=1024")
    optimizer = build_optimizer(build_model(simmim.model), simmim.optimizer, simmim.train_batch_size)
    # 1.25e-3 x batch / 512, and 0.65 less for each of the stem and two blocks below the head
    assert {round(group["lr"], 9) for group in optimizer.param_groups} == {
        round(2.5e-3 * 0.65**layer, 9) for layer in range(4)
    }
    assert all(
        group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0) or is_exempt(parameter, optimizer)
        for group in optimizer.param_groups for parameter in group["params"]
    )


def is_exempt(parameter, optimizer):
    """cls_token (1, 1, C) and the bias tables, (2 * 8 - 1)² + 3 positions by heads."""
    return parameter.shape in ((1, 1, 16), (228, 2))


def test_learning_rate_over_a_run_warms_up_from_alpha_i_and_falls_to_alpha_f(tmp_path):
    overrides = ["max_duration=10ba", "scheduler.warmup=4ba", "scheduler.alpha_i=0.2", "scheduler.alpha_f=0.1",
                 "optimizer.lr=1.0", "optimizer.lr_batch_size=null"]
    trainer = build_trainer(load_recipe(*split(smoke("deit_small_224", tmp_path, *overrides))))
    scheduler = trainer.state.schedulers[0]
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        trainer.state.timestamp = trainer.state.timestamp.to_next_batch(samples=8)
        trainer.state.optimizers[0].step()
        scheduler.step()
    trainer.close()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[7] == pytest.approx(0.55)  # half of the cosine from 1.0 to 0.1
    assert rates[10] == pytest.approx(0.1)


def test_learning_rate_in_steps_warms_up_and_falls_at_its_milestones(tmp_path):
    overrides = ["max_duration=10ba", "scheduler.warmup=2ba", "scheduler.alpha_i=0.5", "optimizer.lr=1.0",
                 "optimizer.lr_batch_size=null", "scheduler.milestones=[0.4dur,8ba]"]
    trainer = build_trainer(load_recipe(*split(smoke("simmim_vitb_pretrain", tmp_path, *overrides))))
    scheduler, rates = trainer.state.schedulers[0], []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        trainer.state.timestamp = trainer.state.timestamp.to_next_batch(samples=8)
        trainer.state.optimizers[0].step()
        scheduler.step()
    trainer.close()
    assert rates == pytest.approx([0.5, 0.75, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_settings_of_the_papers_pretraining():
    simmim = recipe("simmim_vitb_pretrain")
    optimizer = build_optimizer(build_model(recipe("simmim_vitb_pretrain", *SMOKE[7:12]).model), simmim.optimizer, 2048)
    decayed, exempt = optimizer.param_groups[::-1]
    assert decayed["lr"] == exempt["lr"] == 4e-4  # 1e-4 x 2048 / 512
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    # the mask token decays as in the original; the class token, the bias table and what has one dimension does not
    assert sorted(tuple(p.shape) for p in exempt["params"] if p.ndim > 1) == [(1, 1, 16), (228, 2)]
    assert sum(p.shape == (1, 1, 16) for p in decayed["params"]) == 1
    assert repr(build_algorithms(simmim)[0]) == "PatchMasking(unit=32, ratio=0.6)"
    assert simmim.scheduler.alpha_i * 1e-4 == pytest.approx(5e-7)
    assert recipe("simmim_vitb_pretrain", "max_duration=100ep").scheduler.milestones == ["0.875dur"]


def test_sampler_of_pretraining_under_pss():
    pss = build_algorithms(recipe("simmim_vitb_pretrain_pss", "pss.masked_share=0.5"))[0]
    assert repr(pss.sampler) == "StratifiedSampler(masked_share=0.5)"


def split(arguments):
    return arguments[0], arguments[1:]


def test_algorithms_of_the_papers_recipes():
    kinds = {type(algorithm): algorithm for algorithm in build_algorithms(recipe("simmim_vitb_pss"))}
    assert kinds[GradientClipping].clipping_threshold == 5.0
    assert kinds[LabelSmoothing].smoothing == 0.1
    mixing = kinds[MixUpCutMix]
    assert (mixing.mixup_alpha, mixing.cutmix_alpha, mixing.switch_prob) == (0.8, 1.0, 0.5)
    assert EMA not in kinds
    kinds = {type(algorithm): algorithm for algorithm in build_algorithms(recipe("deit_small_224_pss"))}
    assert kinds[EMA].smoothing == 0.99996 and GradientClipping not in kinds


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        ([], Cyclic(cooldown="10ep")),
        (["pss.schedule.name=linear"], Linear(0.2, 1.1, cooldown="10ep")),
        (["pss.schedule.name=fixed", "pss.schedule.keep_rate=0.6"], Fixed(0.6)),
        (["pss.schedule.period=500ba", "pss.schedule.step=null"], Cyclic(step=None, period="500ba", cooldown="10ep")),
    ],
)
def test_variants_of_the_schedule_are_overrides(overrides, schedule):
    assert build_algorithms(recipe("deit_small_224_pss", *overrides))[0].schedule == schedule


def test_pss_may_be_switched_on_and_off():
    assert recipe("deit_small_224_pss", "pss=null").pss is None
    assert recipe("deit_small_224", "pss.sampler=random").pss.schedule == {"name": "cyclic"}


def test_the_papers_models():
    simmim = build_model(recipe("simmim_vitb").model).module
    assert type(simmim) is Beit and simmim.pos_embed is None and simmim.global_pool == "avg"
    assert simmim.blocks[0].attn.relative_position_bias_table.shape == (27 * 27 + 3, 12)
    assert simmim.blocks[3].init_values == 0.1
    assert type(build_model(recipe("deit_small_224_pss").model).module) is VisionTransformer
    rpb = build_model(recipe("deit_small_rpb_384_pss").model).module
    assert type(rpb) is Beit and rpb.pos_embed.shape == (1, 577, 384) and rpb.blocks[0].gamma_1 is None
    # the paper's ViT-B and DeiT-S have 86 and 22 million weights
    assert sum(p.numel() for p in simmim.parameters()) == pytest.approx(86e6, rel=0.02)


@pytest.mark.parametrize("overrides", [
    ["microbatch_size=2"], ["activation_checkpointing=true"], ["tensorboard=true"], ["model.is_distilled=true"],
    ["max_duration=16sp", "scheduler.warmup=8sp", "pss.schedule.period=8sp"], ["max_duration=1ep"],
], ids=lambda overrides: overrides[0])
def test_keys_that_every_recipe_has(overrides, tmp_path):
    main(smoke("deit_small_224_pss", tmp_path, *overrides))
    assert len([line for line in read_log(tmp_path) if "loss/train/total" in line]) == 2
    assert (tmp_path / "tensorboard").exists() == ("tensorboard=true" in overrides)


class Killed(Exception):
    pass


class KilledAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise Killed


@pytest.mark.parametrize(("sampler", "source"), [("magnitude", "synthetic"), ("random", "synthetic"),
                                                 ("random", "digits")])
def test_autoresume_goes_on_within_an_epoch_bit_for_bit(sampler, source, tmp_path):
    """Killed in the middle of the second epoch; with augmentation, mixing, EMA, drop path and a worker."""
    overrides = ["max_duration=2ep", f"pss.sampler={sampler}", f"data.name={source}", "data.num_samples=48",
                 "model.num_classes=10", "data.num_workers=1", f"data.path={tmp_path / 'data'}", "autoresume=true"]
    if source == "digits":
        overrides += ["train_batch_size=240", "model.depth=1"]

    def load(name):
        return load_recipe(*split(smoke("deit_small_224_pss", tmp_path / name, *overrides)))

    straight = train(load("straight"))
    num_batches = int(straight.state.timestamp.batch)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        # called with the trainer right before its fit, and without effect on a fresh run
        killer = KilledAt(num_batches * 3 // 4)
        patch.setattr(training, "restore_generators", lambda trainer: trainer.state.callbacks.append(killer))
        train(load("stopped"))
    assert not torch.equal(*(last_weights(tmp_path / name) for name in ("straight", "stopped")))
    resumed = train(load("stopped"))

    assert resumed.state.timestamp.batch == num_batches
    for expected, actual in zip(
        straight.state.model.state_dict().values(), resumed.state.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, actual)


def last_weights(folder):
    checkpoint = torch.load(folder / "latest-rank0.pt", weights_only=False)
    return checkpoint["state"]["model"]["module.patch_embed.proj.weight"]


# --- bad input -------------------------------------------------------------------------------------------------------

PRETRAIN = ["model.name=simmim_pretrain", "pss.sampler=random", "mixing=null", "label_smoothing=0",
            "optimizer.layer_decay=null", "augmentation.random_erasing=0"]
BAD_INPUT = {
    "unknown_key": (["optimzer.lr=1"], "optimzer is not a key of a recipe; did you mean optimizer?"),
    "unknown_inner_key": (["optimizer.learning=1"], "optimizer.learning is not a key of a recipe"),
    "misspelt_inner_key": (["model.num_clases=3"], "model.num_clases is not a key of a recipe; did you mean "
                           "model.num_classes?"),
    "misspelt_schedule_key": (["pss.schedule.strat=0.2"], "pss.schedule.strat is not a key of cyclic; did you mean "
                              "pss.schedule.start?"),
    "wrong_type": (["train_batch_size=many"], "train_batch_size has a value of the wrong type"),
    "wrong_type_of_group": (["model=deit"], "model must be a group of settings, got 'deit'"),
    "keep_rate_zero": (["pss.schedule.start=0"], "pss.schedule.start must be a keep rate above 0"),
    "eval_keep_rate": (["pss.eval_keep_rate=1.5"], "pss.eval_keep_rate must be a number in (0, 1], got 1.5"),
    "fixed_keep_rate": (["pss.schedule.name=fixed", "pss.schedule.keep_rate=2"], "pss.schedule.keep_rate must be a "
                        "number in (0, 1], got 2"),
    "schedule": (["pss.schedule.name=cubic"], "pss.schedule.name must be one of fixed, linear, cosine, cyclic, "
                 "piecewise, got 'cubic'"),
    "period": (["pss.schedule.period=daily"], "pss.schedule.period must be a time string above 0"),
    "cooldown": (["pss.schedule.cooldown=9ep"], "pss.schedule.cooldown must be no longer than training, got '9ep'"),
    "sampler": (["pss.sampler=best"], "pss.sampler must be one of magnitude, l2_magnitude, random for "
                "model.name=simmim, got 'best'"),
    "model": (["model.name=resnet50"], "model.name must be one of deit, simmim, simmim_pretrain, got 'resnet50'"),
    "size": (["model.size=huge"], "model.size must be one of tiny, small, base, got 'huge'"),
    "image_size": (["model.image_size=33"], "model.image_size must be divisible by patch_size=4, got 33"),
    "no_data_folder": (["data.name=folder", "data.path={tmp}/none"], "data.path must"),
    "empty_data_folder": (["data.name=streaming", "data.path={tmp}/empty"], "data.path must"),
    "no_data_path": (["data.name=folder", "data.path=null"], "data.path must"),
    "data": (["data.name=imagenet"], "data.name must be one of digits, folder, idx, streaming, synthetic"),
    "checkpoint": (["load_path={tmp}/none.pt"], "load_path must be a file, no such file: {tmp}/none.pt"),
    "no_checkpoint": (["load_path={tmp}/empty.pt"], "load_path must be a file of torch.save or safetensors, {tmp}"),
    "pretrained": (["model.pretrained={tmp}/none.pth"], "model.pretrained must be a file, no such file: {tmp}/none"),
    "no_pretrained": (["model.pretrained={tmp}/empty.pt"], "model.pretrained must be a file of torch.save or safet"),
    "masking": (["masking.unit=8"], "masking must be set for model.name=simmim_pretrain and null for any other, got a "
                "group of settings for simmim"),
    "no_masking": (["model.name=simmim_pretrain", "pss=null"], "masking must be set for model.name=simmim_pretrain and "
                   "null for any other, got null for simmim_pretrain"),
    "mixing_in_pretraining": (["model.name=simmim_pretrain", "masking.unit=8", "pss=null"],
                              "mixing must be null for model.name=simmim_pretrain"),
    "mask_unit": ([*PRETRAIN, "masking.unit=6"], "masking.unit must be a multiple of the patch size 4 and divide the "
                  "image size 32 x 32, got 6"),
    "random_erasing": ([*PRETRAIN, "masking.unit=8", "augmentation.random_erasing=0.25"],
                       "augmentation.random_erasing must be 0 for model.name=simmim_pretrain"),
    "short_warmup": (["scheduler.warmup=0.1dur"], "scheduler.warmup must be at least a batch with max_duration=2ba"),
    "mask_ratio": ([*PRETRAIN, "masking.ratio=0"], "masking.ratio must be in (0, 1], got 0"),
    "magnitude_in_pretraining": ([*PRETRAIN, "masking.unit=8", "pss.sampler=magnitude"],
                                 "pss.sampler must be one of random, stratified for "
                                 "model.name=simmim_pretrain, got 'magnitude'"),
    "masked_share": ([*PRETRAIN, "masking.unit=8", "pss.sampler=stratified", "pss.masked_share=2"],
                     "pss.masked_share must be in (0, 1], got 2"),
    "masked_share_of_random": (["pss.masked_share=0.5"], "pss.masked_share must be null unless pss.sampler=stratified"),
    "stratified": (["pss.sampler=stratified"], "pss.sampler must be one of magnitude, l2_magnitude, random for"),
    "lr_schedule": (["scheduler.name=step"], "scheduler.name must be one of cosine, multistep, got 'step'"),
    "milestones": (["scheduler.milestones=[1ba]"], "scheduler.milestones must be times for scheduler.name=multistep"),
    "no_milestones": (["scheduler.name=multistep"], "scheduler.milestones must be times for scheduler.name=multistep"),
    "milestone": (["scheduler.name=multistep", "scheduler.milestones=[soon]"], "scheduler.milestones must be a time "
                  "string above 0 in ep, ba, sp, dur"),
    "both_flags": (["autoresume=true", "save_overwrite=true"], "save_overwrite must be false with autoresume=true"),
    "half_an_epoch": (["max_duration=1.5ep"], "max_duration must be a time string above 0 in ep, ba, sp"),
    "schedule_list": (["pss.schedule.name=[1]"], "pss.schedule.name must be one of fixed, linear"),
    "one_class": (["model.num_classes=1"], "model.num_classes must be at least 2, got 1"),
    "infinite_lr": (["optimizer.lr=.inf"], "optimizer.lr must be above 0 and finite, got inf"),
    "seed": (["seed=-1"], "seed must be in [0, 2^32), got -1"),
    "save_folder": (["save_folder={tmp}/empty.pt/run"], "save_folder must be a folder that can be written"),
    "layer_decay": (["optimizer.layer_decay=0"], "optimizer.layer_decay must be in (0, 1], got 0.0"),
    "checkpoints_to_keep": (["save_num_checkpoints_to_keep=0"], "save_num_checkpoints_to_keep must be at least 1"),
    "classes": (["data.name=digits", "data.path={tmp}/digits"],
                "model.num_classes must be at least 10 for digits, got 7"),
    "max_duration": (["max_duration=long"], "max_duration must be a time string above 0 in ep, ba, sp"),
    "max_duration_number": (["max_duration=10"], "max_duration must be a time string above 0 in ep, ba, sp"),
    "warmup_unit": (["max_duration=16sp"], "scheduler.warmup must be in sp or dur with max_duration=16sp, got '1ba'"),
    "warmup": (["scheduler.warmup=5ba"], "scheduler.warmup must be no longer than max_duration=2ba, got '5ba'"),
    "batch_size": (["train_batch_size=0"], "train_batch_size must be at least 1, got 0"),
    "too_large_batch": (["train_batch_size=17"], "train_batch_size must be at most the 16 training images, got 17"),
    "parallelism": (["parallelism=tp"], "parallelism must be one of ddp, fsdp, fsdp2, got 'tp'"),
    "precision": (["precision=int8"], "precision must be one of null, fp32, amp_fp16, amp_bf16, got 'int8'"),
    "betas": (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers in [0, 1), got [0.9]"),
    "mixing": (["mixing.switch_prob=3"], "mixing.switch_prob must"),
    "no_equals_sign": (["verbose"], "overrides must look like key=value, got 'verbose'"),
}
if not torch.cuda.is_available():
    BAD_INPUT["fsdp"] = (["parallelism=fsdp"], "parallelism must be ddp or fsdp2 without a GPU (FSDP1 needs CUDA)")
    BAD_INPUT["gpu"] = (["device=gpu"], "device must be cpu or null on a machine without a GPU, got 'gpu'")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(case, tmp_path):
    overrides, message = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.pt").write_text("no checkpoint")
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    with pytest.raises(SystemExit) as exit_info:
        main(smoke("simmim_vitb_pss", tmp_path / "run", *overrides))
    text = exit_info.value.code
    assert text.startswith("error: " + message.format(tmp=tmp_path)) and "\n" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe must be a YAML file, no such file: "),
        ("a: [1, 2", "recipe must be a YAML file, "),
        ("- a\n- b", "recipe must be a YAML file of key: value lines, "),
        ("max_duration: 2ba", "data.name must be set, in "),
    ],
)
def test_bad_recipe_file(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_save_folder_with_a_run_in_it(tmp_path):
    main(smoke("deit_small_224_pss", tmp_path))
    with pytest.raises(SystemExit, match="save_folder must be free, .* holds a run: set autoresume=true"):
        main(smoke("deit_small_224_pss", tmp_path))
    with pytest.raises(SystemExit, match=r"error: save_folder must be of the same recipe under autoresume, .* was "
                                         r"trained with optimizer.weight_decay=0.05, got 0.1$"):
        main(smoke("deit_small_224_pss", tmp_path, "autoresume=true", "optimizer.weight_decay=0.1"))
    num_lines = len(read_log(tmp_path))
    main(smoke("deit_small_224_pss", tmp_path, "autoresume=true"))  # it is at its end: nothing to do
    assert len(read_log(tmp_path)) == num_lines
    main(smoke("deit_small_224_pss", tmp_path, "save_overwrite=true", "optimizer.weight_decay=0.1"))
    assert len(read_log(tmp_path)) == num_lines  # of the new run alone
    assert load_recipe(tmp_path / "recipe.yaml").optimizer.weight_decay == 0.1


def test_more_classes_in_the_shards_than_in_the_head_leave_nothing_written(tmp_path):
    write_images(tmp_path / "data" / "train", np.zeros((16, 8, 8), np.uint8), np.full(16, 8))
    write_images(tmp_path / "data" / "val", np.zeros((16, 8, 8), np.uint8), np.full(16, 8))
    with pytest.raises(SystemExit, match="labels must be in .0, model.num_classes=7., got 8"):
        main(smoke("deit_small_224_pss", tmp_path / "run", "data.name=streaming", f"data.path={tmp_path / 'data'}"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_at_the_end_of_its_run_must_be_loaded_for_its_weights(tmp_path):
    main(smoke("deit_small_224_pss", tmp_path / "first"))
    load = f"load_path={tmp_path / 'first' / 'latest-rank0.pt'}"
    with pytest.raises(SystemExit, match="load_path must be of a run before max_duration=2ba, .* is at its end: set"):
        main(smoke("deit_small_224_pss", tmp_path / "second", load))
    load = f"load_path={tmp_path / 'first'}"  # its last checkpoint
    main(smoke("deit_small_224_pss", tmp_path / "third", load, "load_weights_only=true"))
    assert len(read_log(tmp_path / "third")) > 2


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(InputError, match="model.size must be one of"):
        main([*smoke("deit_small_224_pss", tmp_path / "run", "model.size=huge"), "--debug"])


def test_the_command_line_as_a_process(tmp_path):
    arguments = smoke("deit_small_224_pss", tmp_path / "run", "model.size=huge")
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: model.size must be one of tiny, small, base, got 'huge'"
    assert "Traceback" not in result.stderr
