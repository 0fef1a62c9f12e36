import json
from types import SimpleNamespace

import pytest
import timm
import torch
from composer import Callback, Trainer
from composer.core import DataSpec, Event, Timestamp
from safetensors import safe_open
from support.paths import VECTORS
from timm.models.beit import Beit
from torch.nn.functional import conv2d, pixel_shuffle
from torch.utils.data import DataLoader, TensorDataset

from pss_composer import PatchSamplingSchedule, apply_patch_sampling
from pss_composer.models.shape import ViTShape
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.pretraining.masking import PatchMasking, draw_masks
from pss_composer.pretraining.simmim import SimMIM, build_encoder
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.schedules import Fixed

REFERENCE = safe_open(VECTORS / "simmim_pretrain_vectors.safetensors", framework="pt")
KEYS = list(REFERENCE.keys())


def load_reference_model():
    """The reference's weights in a SimMIM of this project: names map one to one, and the decoder drops two axes."""
    config = json.loads(REFERENCE.metadata()["config"])
    encoder = Beit(
        **{key: config[key] for key in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads",
                                        "qkv_bias", "init_values", "use_rel_pos_bias", "use_shared_rel_pos_bias")},
        use_abs_pos_emb=config["use_abs_pos_emb"],
        global_pool="",
    )
    model = SimMIM(encoder)
    weights = {key.removeprefix("weights/"): REFERENCE.get_tensor(key) for key in KEYS if key.startswith("weights/")}
    model.load_state_dict({
        our_name(name): value.flatten(1) if name == "decoder.0.weight" else value for name, value in weights.items()
    }, strict=True)
    return model


def our_name(name):
    names = {"encoder.mask_token": "encoder.patch_embed.norm.mask_token", "decoder.0.weight": "decoder.weight",
             "decoder.0.bias": "decoder.bias"}
    return names.get(name, name)


def reference_batch():
    return REFERENCE.get_tensor("input"), REFERENCE.get_tensor("mask").bool()


def small_model(depth=2):
    torch.manual_seed(0)
    return SimMIM(build_encoder(ViTShape("tiny", image_size=32, patch_size=4, embed_dim=32, depth=depth, num_heads=4,
                                drop_path=0.0)))


def small_batch(num_images=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    return images, draw_masks(num_images, (8, 8), unit=2, generator=generator)


def test_reference_vectors():
    model, batch = load_reference_model(), reference_batch()
    outputs = model(batch)
    loss = model.loss(outputs, batch)
    loss.backward()
    assert outputs.keep_indices is None
    painted = model.unpatchify(outputs.pixels)
    torch.testing.assert_close(painted, REFERENCE.get_tensor("reconstruction"), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, REFERENCE.get_tensor("loss"), atol=1e-5, rtol=0)
    parameters = dict(model.named_parameters())
    gradients = [key.removeprefix("grad/") for key in KEYS if key.startswith("grad/")]
    assert len(gradients) == 5
    for name in gradients:
        expected = REFERENCE.get_tensor(f"grad/{name}")
        gradient = parameters[our_name(name)].grad.view_as(expected)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


def test_patching_keep_rate_one_changes_no_bit():
    plain, sampled, batch = load_reference_model(), load_reference_model(), reference_batch()
    apply_patch_sampling(sampled)
    for model in (plain, sampled):
        model.loss(model(batch), batch).backward()
    for expected, parameter in zip(plain.parameters(), sampled.parameters(), strict=True):
        assert torch.equal(expected.grad, parameter.grad)


def test_decoder_is_a_convolution_and_a_pixel_shuffle():
    model, tokens = small_model(), torch.randn(2, 64, 32)
    feature_map = tokens.transpose(1, 2).view(2, 32, 8, 8)
    expected = pixel_shuffle(conv2d(feature_map, model.decoder.weight[:, :, None, None], model.decoder.bias), 4)
    torch.testing.assert_close(model.unpatchify(model.decoder(tokens)), expected, atol=1e-5, rtol=0)


def test_patchify_and_back_is_the_identity_and_goes_row_by_row():
    model, (images, _) = small_model(), small_batch()
    patches = model.patchify(images)
    assert torch.equal(patches[1, 10].view(3, 4, 4), images[1, :, 4:8, 8:12])  # patch 10 is row 1, column 2
    assert torch.equal(model.unpatchify(patches), images)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "deit3_small_patch16_224",
                                  "vit_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2",
                                  "beit_base_patch16_224"])
def test_any_timm_vit_is_an_encoder(name):
    if "dinov3" in name:
        with pytest.raises(TypeError, match="VisionTransformer or Beit, got Eva"):
            SimMIM(timm.create_model(name, img_size=64, depth=1))
        return
    patch_size = 14 if "patch14" in name else 16
    model = SimMIM(timm.create_model(name, img_size=4 * patch_size, depth=2))
    sampler = apply_patch_sampling(model, sampler="random", keep_rate=0.5)
    batch = torch.randn(2, 3, 4 * patch_size, 4 * patch_size), draw_masks(
        2, (4, 4), generator=torch.Generator().manual_seed(0))
    outputs = model(batch)
    assert outputs.pixels.shape == (2, sampler.keep_indices.shape[1], 3 * patch_size**2)
    model.loss(outputs, batch).backward()
    assert model.encoder.patch_embed.norm.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(("encoder", "message"), [
    (lambda: torch.nn.Linear(2, 2), "got Linear"),
    (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), "got VisionTransformerDistilled"),
    (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True), "a fixed image size"),
])
def test_other_encoders_are_refused(encoder, message):
    with pytest.raises(TypeError, match=message):
        SimMIM(encoder())


def test_masked_pixels_are_not_seen_and_visible_ones_do_not_count():
    model, (images, mask) = small_model().eval(), small_batch()
    pixel_mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    other_masked = torch.where(pixel_mask, torch.randn_like(images), images)
    assert torch.equal(model((images, mask)).pixels, model((other_masked, mask)).pixels)
    outputs = model((images, mask))
    other_visible = torch.where(pixel_mask, images, torch.randn_like(images))
    assert model.loss(outputs, (images, mask)) == model.loss(outputs, (other_visible, mask))
    expected = (model.unpatchify(outputs.pixels) - images).abs()[pixel_mask.expand_as(images)].mean()
    torch.testing.assert_close(model.loss(outputs, (images, mask)), expected, atol=1e-6, rtol=0)


def test_labels_in_the_place_of_the_mask_are_told():
    with pytest.raises(ValueError, match=r"got torch.int64 of \(3,\): add PatchMasking\(\) to the algorithms"):
        small_model()((small_batch()[0], torch.tensor([1, 2, 3])))


# masks

def test_masks_are_whole_units_and_as_many_in_every_image():
    mask = draw_masks(200, (14, 14), unit=2, ratio=0.6, generator=torch.Generator().manual_seed(0))
    units = mask.view(200, 7, 2, 7, 2)
    assert torch.equal(units, units[:, :, :1, :, :1].expand_as(units))
    units = units[:, :, 0, :, 0]
    assert (units.sum(dim=(1, 2)) == 30).all()  # the original's: 0.6 of 49 units, rounded up
    assert len({tuple(image.flatten().tolist()) for image in units}) == 200
    # each unit is masked in 30/49 of the images: within five deviations
    assert (units.float().mean(dim=0) - 30 / 49).abs().max() < 5 * (30 / 49 * 19 / 49 / 200) ** 0.5


def test_a_ratio_of_one_masks_everything():
    assert draw_masks(2, (4, 4), ratio=1.0, generator=torch.Generator()).all()


# PSS in pre-training

@pytest.mark.parametrize("sampler", ["random", StratifiedSampler(), StratifiedSampler(0.3)])
@pytest.mark.parametrize("keep_rate", [0.2, 0.6])
def test_loss_counts_the_masked_pixels_of_kept_tokens(sampler, keep_rate):
    """The oracle: the full picture made of the kept patches, and the mean over kept and masked pixels by hand."""
    model, (images, mask) = small_model(), small_batch()
    patch_sampler = apply_patch_sampling(model, sampler=sampler, keep_rate=keep_rate)
    outputs = model((images, mask))
    keep_indices = patch_sampler.keep_indices
    assert outputs.pixels.shape == (3, keep_indices.shape[1], 48)
    assert torch.equal(outputs.keep_indices, keep_indices)
    total, count = 0.0, 0
    for image in range(3):
        for place, patch in enumerate(keep_indices[image].tolist()):
            row, column = divmod(patch, 8)
            if mask[image, row, column]:
                painted = outputs.pixels[image, place].view(3, 4, 4)
                true = images[image, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4]
                total, count = total + (painted - true).abs().sum(), count + 48
    torch.testing.assert_close(model.loss(outputs, (images, mask)), total / count, atol=1e-6, rtol=0)


def test_scale_of_the_loss_does_not_depend_on_the_keep_rate():
    """A model that paints every pixel 0 has the mean of |x| as its loss: of normal pixels 0.798, at every keep rate."""
    model = small_model()
    torch.nn.init.zeros_(model.decoder.weight)
    torch.nn.init.zeros_(model.decoder.bias)
    patch_sampler = apply_patch_sampling(model, sampler="random")
    images, mask = small_batch(64)
    for keep_rate in (1.0, 0.8, 0.6, 0.4, 0.2):
        patch_sampler.keep_rate = keep_rate
        assert abs(float(model.loss(model((images, mask)), (images, mask))) - 0.798) < 0.01


@pytest.mark.slow
def test_compiled_it_is_one_graph_for_each_keep_rate_and_the_same():
    model, batch = small_model(), small_batch()
    patch_sampler = apply_patch_sampling(model, sampler=StratifiedSampler())

    def loss():
        return model.loss(model(batch), batch)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for keep_rate in (1.0, 0.2, 0.6, 1.0):
        patch_sampler.keep_rate = keep_rate
        torch.manual_seed(1)
        expected = loss()
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(), expected, atol=1e-6, rtol=0)


def test_a_batch_that_keeps_no_masked_token_has_loss_zero():
    model, (images, mask) = small_model(), small_batch()
    batch = images, torch.zeros_like(mask)
    loss = model.loss(model(batch), batch)
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("masked_share", "k", "expected"), [
    (None, 32, 20),   # of 64 patches 40 are masked: the same share of 32
    (None, 8, 5),
    (0.5, 32, 16),
    (0.25, 60, 36),   # 15 asked for, but there are 24 visible patches only
    (1.0, 50, 40),    # 50 asked for, but there are 40 masked patches only
    (1.0, 10, 10),
])
def test_stratified_sampler_keeps_the_chosen_share(masked_share, k, expected):
    _, mask = small_batch(5)
    sampler = StratifiedSampler(masked_share)
    sampler.mask = mask.flatten(1)
    keep_indices = sampler(torch.zeros(5, 64, 1), k)
    assert keep_indices.shape == (5, k)
    assert all(len(set(image.tolist())) == k for image in keep_indices)
    assert (sampler.mask.gather(1, keep_indices).sum(dim=1) == expected).all()


def test_stratified_sampler_is_uniform_within_each_kind():
    torch.manual_seed(0)
    sampler = StratifiedSampler(0.5)
    mask = torch.arange(16) < 10
    sampler.mask = mask.expand(4000, -1)
    kept = torch.zeros(4000, 16).scatter(1, sampler(torch.zeros(4000, 16, 1), 8), 1.0).mean(dim=0)
    # 4 of 10 masked and 4 of 6 visible patches: within five deviations
    assert (kept - torch.where(mask, 0.4, 4 / 6)).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_stratified_sampler_takes_masks_of_different_sizes():
    sampler = StratifiedSampler()
    sampler.mask = torch.arange(16) < torch.tensor([[0], [4], [16]])
    keep_indices = sampler(torch.zeros(3, 16, 1), 8)
    assert sampler.mask.gather(1, keep_indices).sum(dim=1).tolist() == [0, 2, 8]


def test_magnitude_keeps_few_masked_tokens():
    """Why the recipes refuse it: the mask token starts small, so the largest norms are those of visible patches."""
    model, batch = small_model(), small_batch()
    apply_patch_sampling(model, sampler="magnitude", keep_rate=0.2)
    outputs = model(batch)
    assert batch[1].flatten(1).gather(1, outputs.keep_indices).sum() == 0


def test_stratified_sampler_wants_a_mask_and_a_share():
    with pytest.raises(ValueError, match=r"masked_share must be in \(0, 1\], got 0"):
        StratifiedSampler(0)
    with pytest.raises(ValueError, match="the stratified sampler is for SimMIM"):
        StratifiedSampler()(torch.zeros(2, 4, 1), 2)


# in Composer

class StopAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


class Watch(Callback):
    """Notes every mask and loss."""

    def __init__(self):
        self.masks, self.losses, self.eval_masks = {}, {}, []

    def before_forward(self, state, logger):
        self.masks.setdefault(int(state.timestamp.batch), []).append(state.batch[1].clone())

    def after_train_batch(self, state, logger):
        self.losses[int(state.timestamp.batch)] = float(state.loss)

    def eval_before_forward(self, state, logger):
        self.eval_masks.append(state.batch[1].clone())


def pretrain(folder, *, sampler=None, stop_at=None, autoresume=False, seed=3, microbatch_size=None, duration="2ep",
             drop_path=0.2):
    torch.manual_seed(0)
    model = SimMIM(build_encoder(ViTShape("tiny", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                                 drop_path=drop_path)))
    data = TensorDataset(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(5)), torch.zeros(24))
    watch = Watch()
    pss = [PatchSamplingSchedule(Fixed(0.5), sampler=sampler)] if sampler else []
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=4, generator=torch.Generator()),
        eval_dataloader=DataSpec(DataLoader(data, batch_size=12)),
        max_duration=duration,
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        algorithms=[PatchMasking(unit=16), *pss],
        callbacks=[watch] + ([StopAt(stop_at)] if stop_at else []),
        save_folder=str(folder), save_interval="1ba", save_overwrite=not autoresume, run_name="run",
        autoresume=autoresume,
        device_train_microbatch_size=microbatch_size, seed=seed, progress_bar=False,
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        assert stop_at
    trainer.close()
    return trainer.state.model, watch


@pytest.mark.parametrize("sampler", [None, "random", StratifiedSampler(0.5)])
def test_stopped_within_an_epoch_goes_on_bit_for_bit(tmp_path, sampler):
    whole, watch = pretrain(tmp_path / "whole", sampler=sampler)
    pretrain(tmp_path / "cut", sampler=sampler, stop_at=8)
    resumed, watch_after = pretrain(tmp_path / "cut", sampler=sampler, autoresume=True)
    assert sorted(watch_after.masks) == [8, 9, 10, 11]
    for batch in watch_after.masks:
        assert torch.equal(watch.masks[batch][0], watch_after.masks[batch][0])
    for expected, parameter in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, parameter)


def test_masks_follow_seed_and_batch_alone(tmp_path):
    _, watch = pretrain(tmp_path, duration="1ep")
    _, again = pretrain(tmp_path, duration="1ep", microbatch_size=2, drop_path=0.0)
    _, other_seed = pretrain(tmp_path, duration="1ep", seed=4)
    masks = [torch.cat(watch.masks[batch]) for batch in range(6)]
    for batch, mask in enumerate(masks):
        assert torch.equal(mask, torch.cat(again.masks[batch]))  # in microbatches
        assert not torch.equal(mask, torch.cat(other_seed.masks[batch]))
    assert not torch.equal(masks[0], masks[1])


def test_another_rank_has_other_masks(tmp_path, monkeypatch):
    _, watch = pretrain(tmp_path, duration="1ba")
    monkeypatch.setattr("pss_composer.pretraining.masking.dist.get_global_rank", lambda: 1)
    masking, state = PatchMasking(unit=16), SimpleNamespace(
        model=SimMIM(build_encoder(ViTShape("tiny", image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4))),
        batch=torch.zeros(4, 3, 32, 32), rank_zero_seed=3, timestamp=Timestamp(), eval_timestamp=None,
        predict_timestamp=None)
    masking.apply(Event.INIT, state, None)
    masking.apply(Event.BATCH_START, state, None)
    first = watch.masks[0][0]
    assert state.batch[1].shape == first.shape and not torch.equal(state.batch[1], first)
    monkeypatch.undo()
    state.batch = torch.zeros(4, 3, 32, 32)
    masking.apply(Event.BATCH_START, state, None)
    assert torch.equal(state.batch[1], first)


def test_every_evaluation_sees_the_same_masks(tmp_path):
    _, watch = pretrain(tmp_path)
    first, second, third, fourth = watch.eval_masks  # two batches in each of two epochs
    assert torch.equal(first, third) and torch.equal(second, fourth) and not torch.equal(first, second)


def test_prediction_has_masks_too(tmp_path):
    model = small_model(1)
    trainer = Trainer(model=model, algorithms=[PatchMasking(unit=8)], optimizers=torch.optim.SGD(model.parameters()),
                      progress_bar=False)
    images = torch.randn(4, 3, 32, 32)
    outputs = trainer.predict(DataLoader(images, batch_size=2))  # batches without labels
    trainer.close()
    assert [pixels.shape for pixels, _ in outputs] == [(2, 64, 48)] * 2


def test_microbatches_make_the_same_update(tmp_path):
    whole, _ = pretrain(tmp_path, duration="1ep", drop_path=0.0)
    parts, _ = pretrain(tmp_path, duration="1ep", drop_path=0.0, microbatch_size=2)
    for expected, parameter in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(expected, parameter, atol=1e-5, rtol=0)


def test_training_learns(tmp_path):
    _, watch = pretrain(tmp_path, duration="8ep")
    losses = [watch.losses[batch] for batch in sorted(watch.losses)]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def start(model, *algorithms):
    Trainer(model=model, optimizers=torch.optim.SGD(model.parameters()), algorithms=algorithms, progress_bar=False)


def test_masking_is_for_simmim_alone_and_images_of_whole_units():
    with pytest.raises(TypeError, match="PatchMasking is for pretraining.simmim.SimMIM, got SimMIMClassifier"):
        start(SimMIMClassifier(ViTShape("tiny", image_size=32, depth=1)), PatchMasking())
    with pytest.raises(ValueError, match="unit must be a multiple of the patch size 4 and divide .* 32 x 32, got 24"):
        start(small_model(1), PatchMasking(unit=24))
    for arguments, message in [({"unit": 0}, "unit must be at least 1, got 0"), ({"ratio": 0.0}, r"ratio must be in")]:
        with pytest.raises(ValueError, match=message):
            PatchMasking(**arguments)
