"""Evaluation at each keep rate, and FLOP shares against the paper's."""

import pytest
import timm
import torch

from pss_composer import apply_patch_sampling
from pss_composer.evaluation.measuring import count_flops, evaluate_run, flop_shares
from pss_composer.evaluation.runs import load_run
from pss_composer.models.deit import DeiT
from pss_composer.models.shape import ViTShape
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.training.builders import build_data


@pytest.mark.parametrize(
    ("model", "image_size", "shares"),
    [
        (lambda: DeiT(ViTShape("small")), 224, {0.8: 0.792, 0.6: 0.585, 0.4: 0.390, 0.2: 0.196}),
        (lambda: DeiT(ViTShape("small", image_size=384)), 384, {0.8: 0.771, 0.6: 0.556, 0.4: 0.359, 0.2: 0.176}),
        (lambda: SimMIMClassifier(ViTShape("base")), 224, {0.8: 0.797, 0.6: 0.592, 0.4: 0.395, 0.2: 0.197}),
    ],
    ids=["deit_small_224", "deit_small_384", "simmim_vitb"],
)
def test_flop_shares_are_the_papers(model, image_size, shares):
    with torch.device("meta"):  # the counter needs shapes alone
        vit, images = model().module.eval(), torch.zeros(1, 3, image_size, image_size)
    sampler = apply_patch_sampling(vit)
    at_one = count_flops(vit, images)
    for keep_rate, share in shares.items():
        with sampler.evaluating_at(keep_rate):
            assert count_flops(vit, images) / at_one == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "vit_base_patch16_siglip_224"])
def test_flops_are_counted_where_a_parameter_goes_into_a_module(name):
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=7, depth=2, embed_dim=48, num_heads=2)
        images = torch.zeros(2, 3, 224, 224)
    assert count_flops(vit, images) == 2 * count_flops(vit, images[:1]) > 0


def test_evaluate_run_is_right_at_every_keep_rate(runs):
    run = load_run(runs / "digits_pss")
    run.patch_sampler.eval_keep_rate = 0.7
    metrics = evaluate_run(run, [1.0, 0.4])
    assert run.patch_sampler.eval_keep_rate == 0.7
    for keep_rate in (1.0, 0.4):
        run.patch_sampler.eval_keep_rate = keep_rate
        num_right = num_images = 0
        with torch.no_grad():
            data = build_data(run.recipe, "val")
            for images, labels in map(data.batch_transforms, data.dataloader):
                num_right += int((run.model.module.eval()(images).argmax(dim=1) == labels).sum())
                num_images += len(labels)
        assert metrics[keep_rate]["top1"] == pytest.approx(num_right / num_images)


def test_flop_shares_leave_the_keep_rate(runs):
    run = load_run(runs / "digits_pss")
    run.patch_sampler.eval_keep_rate = 0.7
    shares = flop_shares(run, [1.0, 0.5])
    assert shares[1.0] == 1.0 and 0.4 < shares[0.5] < 0.6
    assert run.patch_sampler.eval_keep_rate == 0.7
