"""Bad input ends in one line a mistake, with exit status 1 and nothing written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.recipes import read_log, smoke
from support.recipes import train_by_command as main

from pss_composer.data.sources.digits import write_images
from pss_composer.errors import InputError
from pss_composer.training.reading import load_recipe

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
    "sampler": (["pss.sampler=best"], "pss.sampler must be one of magnitude, l2_magnitude, random, "
                "stratified, got 'best'"),
    "model": (["model.name=resnet50"], "model.name must be one of deit, simmim, simmim_pretrain, or timm/NAME, "
              "hf/NAME, torchvision/NAME, got 'resnet50'"),
    "size": (["model.size=huge"], "model.size must be one of tiny, small, base, got 'huge'"),
    "image_size": (["model.image_size=33"], "model.image_size must be divisible by patch_size=4, got 33"),
    "no_data_folder": (["data.name=folder", "data.path={tmp}/none"], "data.path must"),
    "empty_data_folder": (["data.name=streaming", "data.path={tmp}/empty"], "data.path must"),
    "no_data_path": (["data.name=folder", "data.path=null"], "data.path must"),
    "data": (["data.name=imagenet"], "data.name must be one of digits, folder, streaming, synthetic, "
             "torchvision, got 'imagenet'"),
    "checkpoint": (["load_path={tmp}/none.pt"], "load_path must be readable, {tmp}/none.pt is not: No such file"),
    "no_checkpoint": (["load_path={tmp}/empty.pt"], "load_path must be a file of torch.save or safetensors, {tmp}"),
    "pretrained": (["model.pretrained={tmp}/none.pth"], "model.pretrained must be readable, {tmp}/none.pth is not: No"),
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
                     "pss.masked_share must be a number in (0, 1], got 2"),
    "masked_share_of_random": (["pss.masked_share=0.5"], "pss.masked_share must be null unless pss.sampler=stratified"),
    "stratified": (["pss.sampler=stratified"], "pss.sampler must be one of magnitude, l2_magnitude, random for"),
    "lr_schedule": (["scheduler.name=step"], "scheduler.name must be one of cosine, multistep, got 'step'"),
    "milestones": (["scheduler.milestones=[1ba]"], "scheduler.milestones must be empty for scheduler.name=cosine"),
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
    "warmup": (["scheduler.warmup=5ba"], "scheduler.warmup must be no longer than max_duration=2ba, got '5ba': make it "
               "shorter, like 0.1dur, or 0ep for none"),
    "warmup_in_epochs": (["scheduler.warmup=3ep"], "scheduler.warmup must be no longer than max_duration=2ba, got "
                         "'3ep': make it shorter"),
    "batch_size": (["train_batch_size=0"], "train_batch_size must be at least 1, got 0"),
    "too_large_batch": (["train_batch_size=17"], "train_batch_size must be at most the 16 training images, got 17"),
    "parallelism": (["parallelism=tp"], "parallelism must be one of ddp, fsdp, fsdp2, got 'tp'"),
    "precision": (["precision=int8"], "precision must be one of null, fp32, amp_fp16, amp_bf16, got 'int8'"),
    "betas": (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers in [0, 1), got [0.9]"),
    "mixing": (["mixing.switch_prob=3"], "mixing.switch_prob must"),
    "run_name": (["run_name=../../x"], "run_name must be a name without separators, got '../../x'"),
    "run_name_dots": (["run_name=.."], "run_name must be a name without separators, got '..'"),
    "no_run_name": (["run_name=null"], "run_name has a value of the wrong type or form: field 'run_name' is not Opt"),
    "interpolation": (["run_name=${{nope}}"], "run_name has an interpolation that leads nowhere: Interpolation key"),
    "remote_save_folder": (["save_folder=s3://bucket/run"], "save_folder must be a folder of this machine, got 's3:"),
    "weights_of_nothing": (["load_weights_only=true"], "load_weights_only must be false without load_path, got True"),
    "microbatch": (["microbatch_size=9"], "microbatch_size must be at most train_batch_size=8, got 9"),
    "two_is_no_bool": (["deterministic=2"], "deterministic must be true or false, got 2"),
    "workers": (["data.num_workers=99999"], "data.num_workers must be in [0, 1024], got 99999"),
    "giant": (["model.embed_dim=1000000000"], "model.embed_dim must make a ViT of at most 1e+11 weights with depth=2, "
              "got 1000000000"),
    "giant_image": (["model.image_size=1000000"], "model.image_size must make a ViT of at most 1e+11 weights, got"),
    "giant_patch": (["model.image_size=1000000", "model.patch_size=1000000"], "model.patch_size must make a ViT of at"),
    "giant_head": (["model.num_classes=10000000000000"], "model.num_classes must make a ViT of at most 1e+11 weights"),
    "giant_batch": (["eval_batch_size=1000000000000"], "eval_batch_size must be at most 1048576, got 1000000000000"),
    "unwritable": (["save_folder=/proc/x"], "save_folder must be a folder that can be written, got '/proc/x'"),
    "unreachable": (["load_path=s3://nope/x.pt"], "load_path must be a checkpoint that can be fetched, got "
                    "'s3://nope/x.pt': "),
    "no_equals_sign": (["verbose"], "overrides must look like key=value, got 'verbose'"),
}
if not torch.cuda.is_available():
    BAD_INPUT["fsdp"] = (["parallelism=fsdp"], "parallelism must be ddp or fsdp2 without a GPU (FSDP1 needs CUDA)")
    BAD_INPUT["gpu"] = (["device=gpu"], "device must be cpu or null on a machine without a GPU, got 'gpu'")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(case, tmp_path, monkeypatch):
    overrides, message = BAD_INPUT[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.pt").write_text("no checkpoint")
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(SystemExit) as exit_info:
        main(smoke("simmim_vitb_pss", tmp_path / "run", *overrides))
    lines = exit_info.value.code.split("\n")
    assert lines[0].startswith("error: " + message.format(tmp=tmp_path))
    # these break the rules of several keys
    assert len(lines) == {"mixing_in_pretraining": 4}.get(case, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "recipe must be a YAML file, no such file: "),
        ("a: [1, 2", "recipe must be a YAML file, "),
        ("- a\n- b", "recipe must be a YAML file of key: value lines, "),
        ("max_duration: 2ba\ntrain_batch_size: 8\neval_batch_size: 8\nmodel: {name: deit}\noptimizer: {lr: 1}",
         "data.name must be set, in "),
    ],
)
def test_bad_recipe_file(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_reported_together(tmp_path):
    """Of every group, of several rooms, of keys that do not exist and between groups' own rules."""
    mistakes = {
        "optimzer.lr=1": "optimzer is not a key of a recipe; did you mean optimizer?",
        "model.embed_dim=wide": "model.embed_dim has a value of the wrong type or form: ",
        "augmentation.hflip=3": "augmentation.hflip must be a probability in [0, 1], got 3.0",
        "augmentation.form=slow": "augmentation.form must be one of fast, timm, got 'slow'",
        "data.name=imagenet": "data.name must be one of ",
        "mixing.switch_prob=2": "mixing.switch_prob must be in [0, 1], got 2.0",
        "pss.schedule.start=0": "pss.schedule.start must be a keep rate above 0",
        "seed=-1": "seed must be in [0, 2^32), got -1",
    }
    with pytest.raises(SystemExit) as exit_info:
        main(smoke("simmim_vitb_pss", tmp_path / "run", *mistakes))
    lines = exit_info.value.code.split("\n")
    assert len(lines) == len(mistakes)
    for message in mistakes.values():
        assert any(line.startswith(f"error: {message}") for line in lines), message


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
    message = "error: model.num_classes must fit the labels, which must be in .0, 7., got 8"
    with pytest.raises(SystemExit, match=message):
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
    # a resumed run has its own checkpoint, and does not need the one that it started from
    shutil.rmtree(tmp_path / "first")
    main(smoke("deit_small_224_pss", tmp_path / "third", load, "load_weights_only=true", "autoresume=true"))


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
