"""What is refused, and what is said: the class that was met, its library, why, and what to do."""

import re

import lightning
import open_clip
import pytest
import timm
import torch
import torchvision
import transformers
from support.models import SMALL, build_model
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from pss_composer import apply_patch_sampling, remove_patch_sampling

SUPPORTED = ". Patch sampling works with the plain ViTs of timm, transformers, torchvision and open_clip: ViT, DeiT, "
GRID = "it cuts its grid of tokens into windows or merges them, for which it needs all of them" + SUPPORTED
NO_ATTENTION = "it has no attention between patches" + SUPPORTED
UNKNOWN = "it is not a model that patch sampling knows" + SUPPORTED


class Net(nn.Module):
    """A CNN of one's own."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)


class OwnViT(nn.Module):
    """A ViT of one's own, of a library's blocks."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = PatchEmbed(32, 4, 3, 32), nn.ModuleList(Block(32, 4) for _ in range(4))


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model, nn.Linear(8, 2)


class Lit(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.net = model


def hugging_face(name, **config):
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config))


def composer(model):
    models = pytest.importorskip("composer.models")
    return models.ComposerClassifier(model, num_classes=getattr(model, "num_classes", 2))


def hugging_face_in_composer(model):
    return pytest.importorskip("composer.models").HuggingFaceModel(model, metrics=[])


REFUSED = {
    # timm
    "resnet": (lambda: timm.create_model("resnet18"), "timm's ResNet", NO_ATTENTION),
    "convnext": (lambda: timm.create_model("convnext_atto"), "timm's ConvNeXt", NO_ATTENTION),
    "attention pool": (lambda: timm.create_model("resnet50_clip"), "timm's ByobNet", NO_ATTENTION),
    "mixer": (lambda: timm.create_model("mixer_s32_224"), "timm's MlpMixer", NO_ATTENTION),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "timm's SwinTransformer", GRID),
    "hiera": (lambda: timm.create_model("hiera_tiny_224"), "timm's Hiera", GRID),
    "sam": (lambda: timm.create_model("samvit_base_patch16"), "timm's VisionTransformerSAM", GRID),
    "mvit": (lambda: timm.create_model("mvitv2_tiny"), "timm's MultiScaleVit", GRID),
    "pvt": (lambda: timm.create_model("pvt_v2_b0"), "timm's PyramidVisionTransformerV2", GRID),
    "maxvit": (lambda: timm.create_model("maxvit_rmlp_pico_rw_256"), "timm's MaxxVit", GRID),
    "convit": (lambda: timm.create_model("convit_tiny"), "timm's ConVit", UNKNOWN),
    # transformers
    "hf swin": (lambda: hugging_face("SwinForImageClassification"), "transformers' SwinForImageClassification", GRID),
    "hf hiera": (lambda: hugging_face("HieraModel"), "transformers' HieraModel", GRID),
    "hf sam": (lambda: hugging_face("SamVisionModel"), "transformers' SamVisionModel", GRID),
    "hf pvt": (lambda: hugging_face("PvtModel"), "transformers' PvtModel", GRID),
    "hf resnet": (lambda: hugging_face("ResNetModel"), "transformers' ResNetModel", NO_ATTENTION),
    "hf yolos": (lambda: hugging_face("YolosModel"), "transformers' YolosModel", UNKNOWN),
    # torchvision
    "tv resnet": (lambda: torchvision.models.resnet18(), "torchvision's ResNet", NO_ATTENTION),
    "tv swin": (lambda: torchvision.models.swin_t(), "torchvision's SwinTransformer", GRID),
    "tv mvit": (lambda: torchvision.models.video.mvit_v1_b(), "torchvision's MViT", GRID),
    # open_clip
    "oc resnet": (lambda: open_clip.CLIP(8, dict(layers=[1, 1, 1, 1], width=8, image_size=32), dict(layers=1)),
                  "open_clip's ModifiedResNet (inside CLIP)", NO_ATTENTION),
    "oc timm": (lambda: open_clip.CLIP(8, dict(timm_model_name="convnext_atto", timm_pool=""), dict(layers=1)),
                "timm's ConvNeXt (inside CLIP)", NO_ATTENTION),
    # one's own
    "own": (Net, "tests' Net", UNKNOWN),
    "own vit": (OwnViT, "tests' OwnViT", UNKNOWN),
    "no class of its own": (lambda: nn.Sequential(nn.Linear(2, 2)), "torch's Sequential", UNKNOWN),
    # inside wrappers
    "wrapped": (lambda: Wrapper(timm.create_model("resnet18")), "timm's ResNet (inside Wrapper)", NO_ATTENTION),
    "composer": (lambda: composer(timm.create_model("resnet18")), "timm's ResNet (inside ComposerClassifier)",
                 NO_ATTENTION),
    "composer, own": (lambda: composer(Net()), "tests' Net (inside ComposerClassifier)", UNKNOWN),
    "hf in composer": (lambda: hugging_face_in_composer(hugging_face("SwinForImageClassification")),
                       "transformers' SwinForImageClassification (inside HuggingFaceModel)", GRID),
    "lightning": (lambda: Lit(timm.create_model("resnet18")), "timm's ResNet (inside Lit)", NO_ATTENTION),
    "lightning, own": (lambda: Lit(Net()), "tests' Net (inside Lit)", UNKNOWN),
    "compiled": (lambda: torch.compile(timm.create_model("resnet18")), "timm's ResNet (inside OptimizedModule)",
                 NO_ATTENTION),
    "nested": (lambda: torch.compile(Lit(composer(timm.create_model("resnet18")))),
               "timm's ResNet (inside OptimizedModule)", NO_ATTENTION),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_class_the_reason_and_what_to_do(name):
    build, met, reason = REFUSED[name]
    with torch.device("meta"):
        model = build()
    before = str(model)
    with pytest.raises(TypeError) as refusal:
        apply_patch_sampling(model)
    message = str(refusal.value)
    assert message.startswith(f"cannot drop patch tokens in {met}: {reason}")
    assert "take one of these" in message and "\n" not in message
    assert ("register_adapter" in message) == (reason is UNKNOWN)
    assert str(model) == before


def test_ddp_is_a_wrapper(tmp_path):
    is_own = not torch.distributed.is_initialized()  # a test of Composer in this process leaves a process group
    if is_own:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"in timm's ResNet \(inside DistributedDataParallel\): it has no"):
            apply_patch_sampling(nn.parallel.DistributedDataParallel(timm.create_model("resnet18")))
    finally:
        if is_own:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "None"),
        ("vit_small_patch16_224", "the string 'vit_small_patch16_224': build the model of that name first"),
        (VisionTransformer, "the class VisionTransformer: pass an object of it"),
        (torchvision.models.vit_b_16, "an object of class function"),
        ([1], "an object of class list"),
    ],
)
def test_what_is_no_model_is_a_line_that_names_the_argument(value, message):
    for function in (apply_patch_sampling, remove_patch_sampling):
        with pytest.raises(TypeError, match=f"^model must be a torch.nn.Module, got {re.escape(message)}$"):
            function(value)


def test_of_two_vits_one_must_be_named():
    model = nn.ModuleDict({"student": build_model("vit"), "teacher": build_model("torchvision")})
    with pytest.raises(TypeError, match=r"^ModuleDict contains 2 ViTs \(student, teacher\): call apply_patch_sampl"):
        apply_patch_sampling(model)
    sampler = apply_patch_sampling(model["student"])
    assert apply_patch_sampling(model, keep_rate=0.5) is sampler
    apply_patch_sampling(model["teacher"])
    with pytest.raises(TypeError, match=r"^ModuleDict contains 2 patch samplers \(student.patch_drop, teacher.encoder"):
        apply_patch_sampling(model)


@pytest.mark.parametrize("method", ["forward", "forward_features", "_pos_embed"])
def test_a_subclass_that_may_go_past_the_slot_is_refused(method):
    subclass = type("Mine", (VisionTransformer,), {method: lambda self, x: x})
    with pytest.raises(TypeError) as refusal:
        apply_patch_sampling(nn.Sequential(subclass(**SMALL)))
    message = str(refusal.value)
    assert message.startswith("cannot drop patch tokens in Mine: it is a subclass of timm's VisionTransformer with "
                              f"its own {method}, which may go past the place where tokens are dropped")
    assert "register_adapter(Mine, pss_composer.surgery.timm.plain.fit_vision_transformer, num_prefix_" in message


def test_a_subclass_that_changes_nothing_of_that_is_a_vit():
    subclass = type("Mine", (VisionTransformer,), {"forward_head": lambda self, x: x[:, 0]})
    apply_patch_sampling(subclass(**SMALL))
