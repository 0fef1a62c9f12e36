"""Every recipe trains, every setting has its effect, and bad input ends in one line with nothing written."""


import pytest
import torch
from composer import Callback
from composer.algorithms import GradientClipping, LabelSmoothing
from omegaconf import OmegaConf
from support.paths import ROOT, YAMLS
from support.recipes import SMOKE, read_log, smoke, split
from support.recipes import train_by_command as main
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

from pss_composer.schedules import Cyclic, Fixed, Linear
from pss_composer.training import trainer as training
from pss_composer.training.builders import build_algorithms, build_model
from pss_composer.training.ema import EMA
from pss_composer.training.mixing import MixUpCutMix
from pss_composer.training.optim import build_optimizer
from pss_composer.training.reading import load_recipe
from pss_composer.training.trainer import build_trainer, train

RECIPES = sorted(YAMLS.glob("*.yaml"))


def test_all_recipes_are_there():
    assert [path.stem for path in RECIPES] == [
        "deit_small_224", "deit_small_224_pss", "deit_small_384", "deit_small_384_pss", "deit_small_rpb_224_pss",
        "deit_small_rpb_384_pss", "digits", "digits_finetune_pss", "digits_pretrain", "digits_pss",
        "finetune_dinov2_pss", "finetune_huggingface_pss", "finetune_timm_pss", "simmim_vitb", "simmim_vitb_pretrain",
        "simmim_vitb_pretrain_pss", "simmim_vitb_pss",
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
@pytest.mark.slow
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
