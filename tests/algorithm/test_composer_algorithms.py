"""Every vision algorithm of Composer with PSS, before it and after it in the list of algorithms.

What an algorithm does alone, without PSS, is found by running it: where it trains, it must train with PSS, with the
right number of tokens in every batch; where it resumes bit for bit, it must with PSS; where it fails, it fails alike.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import composer.algorithms
import pytest
import torch
from composer import Algorithm
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    AugMix,
    BlurPool,
    ChannelsLast,
    ColOut,
    CutMix,
    CutOut,
    Factorize,
    GhostBatchNorm,
    GradientClipping,
    GyroDropout,
    LabelSmoothing,
    LayerFreezing,
    LowPrecisionGroupNorm,
    LowPrecisionLayerNorm,
    MixUp,
    NoOpModel,
    ProgressiveResizing,
    RandAugment,
    SelectiveBackprop,
    SqueezeExcite,
    StochasticDepth,
    WeightStandardization,
)
from composer.algorithms.factorize import apply_factorization
from composer.algorithms.factorize.factorize_modules import FactorizedLinear
from composer.algorithms.gyro_dropout.gyro_dropout import GyroDropoutLayer, apply_gyro_dropout
from composer.algorithms.low_precision_layernorm import apply_low_precision_layernorm
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.core import Precision
from composer.utils import dist
from support.models import SMALL, build_model
from support.trainers import TokenRecorder, build_trainer, copy_weights, logged
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from pss_composer import PatchSamplingSchedule, apply_patch_sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* (has|have) known issues:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*GyroDropout is not implemented in a way that allows:UserWarning"),
    pytest.mark.filterwarnings("ignore::composer.algorithms.warnings.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoints with layer freezing cannot reliably be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:AdamW is not in the state_dict:UserWarning"),  # SAM has wrapped it
    pytest.mark.filterwarnings("ignore:Cannot split tensor of length 2 into batches of size 4:UserWarning"),
]

# 4 batches of an epoch have ρ = 0.2, 0.6, 1, 0.6; of 64 patches and a class token 13, 39 and 65 tokens stay
FULL = (13, 39, 65, 39)
LANGUAGE = {"Alibi", "GatedLinearUnits", "SeqLengthWarmup"}


@dataclass(frozen=True)
class Row:
    """An algorithm of Composer.

    Args:
        build: Builds it.
        tokens: Tokens of each batch in both epochs.
        num_passes: Forward passes in training mode for each batch.
        is_exact: Whether it resumes bit for bit without PSS.
        fails: For `vit` and `beit`, the error of training without PSS.
        vit: More arguments of the model.
        is_saved: Whether a checkpoint can be saved.
    """

    build: Callable[[], Algorithm]
    tokens: Sequence[int] = FULL + FULL
    num_passes: int = 1
    is_exact: bool = True
    fails: dict[str, str] = field(default_factory=dict)
    vit: dict = field(default_factory=dict)
    is_saved: bool = True


OTHER_SIZE = "Input height .* doesn't match model"
GYRO = "The size of tensor a .* must match the size of tensor b"  # its masks are for (B, C), not for (B, T, C)
TABLE = {
    "AugMix": Row(AugMix),
    "BlurPool": Row(lambda: BlurPool(min_channels=1)),
    "ChannelsLast": Row(ChannelsLast),
    # 24 x 24 pixels: 36 patches
    "ColOut": Row(lambda: ColOut(0.25, 0.25), (7, 22, 37, 22) * 2, fails={"beit": OTHER_SIZE},
                  vit={"dynamic_img_size": True}),
    "CutMix": Row(CutMix),
    "CutOut": Row(CutOut),
    "EMA": Row(lambda: EMA(half_life="3ba", update_interval="1ba")),
    # timm's Beit reads the weight of a layer that is then factorized
    "Factorize": Row(lambda: Factorize(min_channels=1, latent_channels=2, min_features=8, latent_features=4),
                     fails={"beit": "'FactorizedLinear' object has no attribute 'weight'"}),
    "GhostBatchNorm": Row(lambda: GhostBatchNorm(2)),  # nothing to replace
    "GradientClipping": Row(lambda: GradientClipping("norm", 0.1)),
    "GyroDropout": Row(lambda: GyroDropout(0.5, sigma=2, tau=2), fails={"vit": GYRO, "beit": GYRO}),
    "LabelSmoothing": Row(lambda: LabelSmoothing(0.1)),
    "LayerFreezing": Row(lambda: LayerFreezing(0.0, 0.5), is_saved=False),
    "LowPrecisionGroupNorm": Row(LowPrecisionGroupNorm),  # nothing to replace
    "LowPrecisionLayerNorm": Row(LowPrecisionLayerNorm),  # nothing in fp32, which is all there is on a CPU
    "MixUp": Row(MixUp),
    # 16 x 16 pixels in the first epoch: 16 patches
    "ProgressiveResizing": Row(lambda: ProgressiveResizing(delay_fraction=0.0, finetune_fraction=0.5),
                               (3, 10, 17, 10, *FULL), fails={"beit": OTHER_SIZE}, vit={"dynamic_img_size": True}),
    "RandAugment": Row(RandAugment),
    "SAM": Row(SAM, num_passes=2, is_exact=False),
    "SelectiveBackprop": Row(lambda: SelectiveBackprop(0.0, 1.0, 0.5, interrupt=0), num_passes=2),
    "SqueezeExcite": Row(lambda: SqueezeExcite(min_channels=1, latent_channels=4)),
    "StochasticDepth": Row(lambda: StochasticDepth("ResNetBottleneck")),  # nothing to replace
    "SWA": Row(lambda: SWA("0.1dur", "0.9dur", update_interval="1ba")),
    "WeightStandardization": Row(WeightStandardization),
}
MODELS = {
    "vit": lambda **options: VisionTransformer(**SMALL, **options),
    "beit": lambda **options: Beit(**SMALL, use_rel_pos_bias=True, init_values=0.1),
}


def train(row, name, place, folder=None, checkpoint=None):
    """A run of two epochs; `place` says where in the list of algorithms PSS stands, if at all."""
    torch.manual_seed(3)
    dataset = FakeData(16, (3, 32, 32), 7, transform=ToTensor())
    schedule = {"alone": [], "first": [PatchSamplingSchedule()], "last": [PatchSamplingSchedule()]}[place]
    algorithms = [row.build(), *schedule] if place == "last" else [*schedule, row.build()]
    recorder = TokenRecorder()
    trainer = build_trainer(
        algorithms, vit=MODELS[name](**row.vit), callbacks=recorder, load_path=checkpoint,
        train_dataloader=DataLoader(dataset, 4, sampler=dist.get_sampler(dataset, shuffle=True)),
        save_folder=folder, save_interval="5ba",
    )
    try:
        trainer.fit()
    finally:
        trainer.close()
    return logged(trainer, "loss/train/total"), copy_weights(trainer), recorder


def is_same_end(resumed, straight):
    """Whether a run that went on after 5 of 8 batches ended bit for bit where the run without a stop did."""
    (losses, weights, _), (all_losses, all_weights, _) = resumed, straight
    return losses == all_losses[5:] and weights.keys() == all_weights.keys() and all(
        torch.equal(weights[name], all_weights[name]) for name in weights
    )


@cache
def outcome(algorithm, name, place, folder):
    """The error, or the run and whether it resumes."""
    row = TABLE[algorithm]
    try:
        straight = train(row, name, place, str(folder / "straight") if row.is_saved else None)
    except Exception as error:
        return error, None, None
    if not row.is_saved:
        return None, straight, None
    checkpoint = str(folder / "straight" / "ep1-ba5-rank0.pt")
    return None, straight, is_same_end(train(row, name, place, str(folder / "resumed"), checkpoint), straight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("algorithm", TABLE)
def test_the_table_says_what_it_does_without_pss(algorithm, name, folder):
    row = TABLE[algorithm]
    error, _, is_exact = outcome(algorithm, name, "alone", folder / f"{algorithm}-{name}-alone")
    if name in row.fails:
        assert re.search(row.fails[name], str(error))
    else:
        assert (error, is_exact) == (None, row.is_exact if row.is_saved else None)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("algorithm", TABLE)
def test_with_pss_it_does_what_it_does_without(algorithm, name, place, folder):
    row = TABLE[algorithm]
    alone, together = (outcome(algorithm, name, each, folder / f"{algorithm}-{name}-{each}") for each in
                       ("alone", place))
    assert type(together[0]) is type(alone[0]), together[0]
    if name in row.fails:
        assert re.search(row.fails[name], str(together[0]))
        return
    losses, weights, recorder = together[1]
    assert torch.tensor(losses).isfinite().all() and len(losses) == 8
    assert list(weights) == list(alone[1][1]), "the same layers are replaced"
    assert recorder.seen == [(True, tokens) for tokens in row.tokens for _ in range(row.num_passes)]
    assert recorder.batches == [batch for batch in range(8) for _ in range(row.num_passes)]
    if alone[2]:
        assert together[2], "it resumes bit for bit without PSS"


def test_the_table_has_every_vision_algorithm():
    known = {name for name, value in vars(composer.algorithms).items()
             if inspect.isclass(value) and issubclass(value, Algorithm)}
    assert known == {*TABLE, *LANGUAGE, "NoOpModel"}


def test_layer_freezing_cannot_be_saved_without_pss_either(tmp_path):
    with pytest.raises(KeyError):
        train(TABLE["LayerFreezing"], "vit", "alone", str(tmp_path))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_model_that_is_replaced_is_refused(place):
    with pytest.raises(ValueError, match="must not hold PatchSamplingSchedule and NoOpModel, which replaces the ViT"):
        train(Row(NoOpModel), "vit", place)


@pytest.mark.parametrize("name", ["vit", "beit", "beit_shared", "beit_no_bias"])
@pytest.mark.parametrize(("replacement", "apply"), [
    (LPLayerNorm, lambda model: apply_low_precision_layernorm(model, Precision.AMP_BF16)),
    (GyroDropoutLayer, lambda model: apply_gyro_dropout(model, 4, 2, 0.5, 2, 2)),
    (FactorizedLinear, lambda model: apply_factorization(model, min_features=8, latent_features=4)),
], ids=["LowPrecisionLayerNorm", "GyroDropout", "Factorize"])
def test_surgery_by_class_finds_the_same_layers(name, replacement, apply):
    plain, sampled = build_model(name), build_model(name)
    apply_patch_sampling(sampled)
    found = []
    for model in (plain, sampled):
        apply(model)
        found.append(Counter(path.replace("pos_drop.0", "pos_drop") for path, module in model.named_modules()
                             if isinstance(module, replacement)))
    assert found[0] == found[1] and found[0]
