"""Small models of every library in a recipe, and files with their weights as the library itself writes them."""

from functools import partial

import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms._presets import ImageClassification

from support.recipes import HF_CONFIG, smoke

SIZES = dict(embed_dim=16, depth=2, num_heads=2)
TIMM = "vit_small_patch16_224.augreg_in21k"
LIBRARIES = ("timm", "hf", "torchvision")


class TinyWeights(WeightsEnum):
    """Weights that nobody has; torchvision knows from them what images a model takes."""

    DEFAULT = Weights(url="file:///nowhere", transforms=partial(ImageClassification, crop_size=32), meta={})


@register_model(name="vit_tiny_pss")
def build_torchvision(*, weights: TinyWeights | None = None, progress=True, **arguments):
    """The names of torchvision itself are of ViTs with 86 million weights or more."""
    assert weights is None
    return VisionTransformer(**{"image_size": 32, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16,
                                "mlp_dim": 32} | arguments)


def smoke_library(library, folder, *overrides):
    """The arguments of a command that trains a small model of a library for two batches."""
    if library == "timm":
        return smoke("finetune_timm_pss", folder, *overrides)
    if library == "hf":
        return smoke("finetune_huggingface_pss", folder, *overrides)
    arguments = smoke("finetune_timm_pss", folder, "model.name=torchvision/vit_tiny_pss", "model.patch_size=null",
                      "model.drop_path=null", *overrides)
    sizes = {f"model.arguments.{key}={value}" for key, value in SIZES.items()}
    return [each for each in arguments if each not in sizes]


def build(library, *, num_classes=7, image_size=32):
    """The same model, built by the library alone, every weight random."""
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(TIMM, num_classes=num_classes, img_size=image_size, patch_size=4, **SIZES)
    elif library == "hf":
        config = transformers.ViTConfig(**HF_CONFIG | {"image_size": image_size}, num_labels=num_classes)
        model = transformers.ViTForImageClassification(config)
    else:
        model = torchvision.models.get_model("vit_tiny_pss", num_classes=num_classes, image_size=image_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def read_logits(model, images):
    outputs = model(images)
    return outputs.logits if hasattr(outputs, "logits") else outputs


def save_pth(model, path):
    torch.save(model.state_dict(), path)
    return path


def save_safetensors(model, path):
    save_file(model.state_dict(), path, {"format": "pt"})
    return path


def save_folder(model, path, *, is_safe=True):
    """A folder as transformers writes it; with `pytorch_model.bin` as in its early years."""
    model.save_pretrained(path)
    if not is_safe:
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


# what a library writes -> library, function that writes it
FORMATS = {
    "timm.safetensors": ("timm", save_safetensors),
    "timm.pth": ("timm", save_pth),
    "torchvision.pth": ("torchvision", save_pth),
    "hf_folder": ("hf", save_folder),
    "hf_folder_of_old": ("hf", partial(save_folder, is_safe=False)),
    "hf.safetensors": ("hf", save_safetensors),
}
