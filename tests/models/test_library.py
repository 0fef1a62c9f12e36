"""Any library's ViT as `model.name`: its weights, its mistakes, its optimizer, and what a run does with it."""

import hashlib
import json
import sys

import huggingface_hub
import pytest
import timm
import torch
import transformers
from composer import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file
from support.library import (
    FORMATS,
    LIBRARIES,
    SIZES,
    TIMM,
    build,
    build_torchvision,
    read_logits,
    save_folder,
    save_pth,
    smoke_library,
)
from support.models import random_images
from support.recipes import HF_CONFIG, read_log, smoke, split
from support.recipes import train_by_command as main
from timm.models import _registry
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.transforms._presets import ImageClassification

from pss_composer import apply_patch_sampling, cli
from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.transfer import load_pretrained
from pss_composer.errors import InputError
from pss_composer.evaluation.pictures import plot_kept_patches
from pss_composer.evaluation.runs import load_run
from pss_composer.models.settings import ModelSettings
from pss_composer.training import trainer as training
from pss_composer.training.builders import build_model
from pss_composer.training.optim import build_optimizer
from pss_composer.training.reading import load_recipe
from pss_composer.training.recipe import OptimizerSettings
from pss_composer.training.trainer import build_trainer, train

# a session remembers that it is offline; its name in the client of transformers 5, and of 4.57
reset_sessions = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils._http.reset_sessions


def load(arguments):
    return load_recipe(*split(arguments))


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


# --- weights from disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_weights_from_disk_are_the_librarys(form, tmp_path, capsys):
    library, save = FORMATS[form]
    original = build(library)
    path = save(original, tmp_path / form)
    trainer = build_trainer(load(smoke_library(library, tmp_path / "run", f"model.pretrained={path}")))
    trainer.close()
    weights = trainer.state.model.module.state_dict()
    assert weights.keys() == original.state_dict().keys()
    for name, weight in original.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert "loaded" in capsys.readouterr().out
    main(smoke_library(library, tmp_path / "run", f"model.pretrained={path}"))
    assert len([line for line in read_log(tmp_path / "run") if "loss/train/total" in line]) == 2


@pytest.mark.parametrize("form", FORMATS)
def test_the_head_of_another_task_is_new_and_the_positions_are_interpolated(form, tmp_path, capsys):
    library, save = FORMATS[form]
    original = build(library, num_classes=9, image_size=32)
    path = save(original, tmp_path / form)
    arguments = smoke_library(library, tmp_path / "run", f"model.pretrained={path}", "model.image_size=48")
    model = build_trainer(load(arguments)).state.model.eval()
    account = capsys.readouterr().out
    head = {"timm": "head.weight", "hf": "classifier.weight", "torchvision": "heads.head.weight"}[library]
    assert "left at initial values: 2 (" in account and head in account.split("left at initial values")[1]
    expected, weights = original.state_dict(), model.module.state_dict()
    assert weights[head].shape == (7, 16)
    changed = {name for name in weights if weights[name].shape != expected[name].shape or
               not torch.equal(weights[name], expected[name])}
    heads = {head, head.replace("weight", "bias")}
    if library == "hf":  # in the forward pass
        assert changed == heads
        images = torch.randn(2, 3, 48, 48)
        tokens = original.vit(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model((images, None)), model.module.classifier(tokens[:, 0]))
        return
    positions = {"timm": "pos_embed", "torchvision": "encoder.pos_embedding"}[library]
    assert changed == heads | {positions} and f"{positions} (1, 65, 16) -> (1, 145, 16)" in account
    if library == "timm":  # timm's own loading
        oracle = timm.create_model(TIMM, pretrained=True, num_classes=7, img_size=48, patch_size=4, **SIZES,
                                   pretrained_cfg_overlay={"file": str(path), "custom_load": False, "num_classes": 9})
        assert torch.equal(weights[positions], oracle.state_dict()[positions])


@pytest.mark.parametrize("library", LIBRARIES)
def test_weights_of_a_run_start_another_run(library, tmp_path):
    first = train(load(smoke_library(library, tmp_path / "first")))
    arguments = smoke_library(library, tmp_path / "second", f"model.pretrained={tmp_path / 'first'}")
    second = build_trainer(load(arguments)).state.model.state_dict()
    for name, weight in first.state.model.state_dict().items():
        assert torch.equal(weight, second[name]), name


BAD_WEIGHTS = {
    "timm": (lambda weights: weights.pop("blocks.0.attn.qkv.weight"), "has no blocks.0.attn.qkv.weight"),
    "hf": (lambda weights: weights.pop("vit.layernorm.bias"), "has no vit.layernorm.bias"),
    "torchvision": (lambda weights: weights.update({"conv_proj.weight": torch.zeros(16, 3, 8, 8)}),
                    "has (16, 3, 8, 8) at conv_proj.weight, the model (16, 3, 4, 4)"),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("is_folder", [False, True])
def test_weights_of_another_model_are_refused(library, is_folder, tmp_path):
    model = build(library)
    spoil, finding = BAD_WEIGHTS[library]
    weights = model.state_dict()
    spoil(weights)
    path = tmp_path / "weights.pth"
    if is_folder and library == "hf":
        path = save_folder(model, tmp_path / "folder", is_safe=False)
        torch.save(weights, path / "pytorch_model.bin")
    else:
        torch.save(weights, path)
    with pytest.raises(SystemExit) as exit_info:
        main(smoke_library(library, tmp_path / "run", f"model.pretrained={path}"))
    assert exit_info.value.code == f"error: model.pretrained must be of the model's architecture, {path} {finding}"
    assert not (tmp_path / "run").exists()


def test_a_file_of_the_bare_model_of_transformers(tmp_path):
    original = build("hf")
    path = save_pth(original.vit, tmp_path / "vit.pth")
    recipe = load(smoke_library("hf", tmp_path / "run"))
    model = build_model(recipe.model)
    transfer = load_pretrained(model, path)
    assert transfer.initial == ["classifier.weight", "classifier.bias"] and not transfer.dropped
    assert torch.equal(model.module.vit.layernorm.weight, original.vit.layernorm.weight)


# --- the library's own download ------------------------------------------------------------------------------------


def test_pretrained_by_timm(tmp_path, monkeypatch, capsys):
    original = build("timm", num_classes=9)
    path = save_pth(original, tmp_path / "weights.pth")
    cfg = timm.models.get_pretrained_cfg(TIMM)
    monkeypatch.setitem(_registry._model_pretrained_cfgs, TIMM, type(cfg)(
        **{key: value for key, value in vars(cfg).items() if key not in ("file", "custom_load", "num_classes")},
        file=str(path), num_classes=9,
    ))
    arguments = smoke_library("timm", tmp_path / "run", "model.pretrained=true", "augmentation.mean=[0.4,0.5,0.6]")
    model = build_trainer(load(arguments)).state.model
    assert torch.equal(model.module.blocks[1].attn.qkv.weight, original.blocks[1].attn.qkv.weight)
    assert model.module.head.weight.shape == (7, 16)
    assert capsys.readouterr().out.splitlines() == [
        "model.pretrained=true", f"loaded by timm: {TIMM}",
        f"timm/{TIMM} was trained with augmentation.mean=[0.5, 0.5, 0.5] and augmentation.std=[0.5, 0.5, 0.5], the "
        "recipe has [0.4, 0.5, 0.6] and [0.5, 0.5, 0.5]",
    ]


def test_pretrained_by_transformers(tmp_path, capsys):
    original = build("hf", num_classes=9)
    folder = save_folder(original, tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    arguments = smoke_library("hf", tmp_path / "run", f"model.name=hf/{folder}", "model.pretrained=true")
    model = build_trainer(load(arguments)).state.model
    assert torch.equal(model.module.vit.layernorm.weight, original.vit.layernorm.weight)
    out = capsys.readouterr().out
    assert f"loaded by transformers: 38 weights from {folder}\n" in out
    assert "left at initial values: 2 (classifier.bias, classifier.weight)" in out
    assert "was trained with augmentation.mean=[0.1, 0.1, 0.1] and augmentation.std=[0.2, 0.2, 0.2], the recipe" in out


def test_pretrained_by_torchvision(tmp_path, monkeypatch):
    original = build("torchvision", num_classes=9)
    path = save_pth(original, tmp_path / "weights.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(tmp_path / f"weights-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    class TinyWeights(WeightsEnum):
        FIRST = Weights(url=path.as_uri(), transforms=lambda: ImageClassification(crop_size=32), meta={})
        DEFAULT = FIRST

    def vit_tiny_pretrained(*, weights: TinyWeights | None = None, progress: bool = True, **arguments):
        return build_torchvision(**arguments)

    monkeypatch.setattr("torchvision.models._api.BUILTIN_MODELS", {})
    register_model()(vit_tiny_pretrained)
    recipe = load(smoke_library("torchvision", tmp_path / "run", "model.name=torchvision/vit_tiny_pretrained",
                                "model.pretrained=true", "model.image_size=48"))
    model = build_model(recipe.model)
    assert torch.equal(model.module.encoder.ln.weight, original.encoder.ln.weight)
    assert model.module.encoder.pos_embedding.shape == (1, 145, 16)
    assert model.normalization.mean == (0.485, 0.456, 0.406) and "TinyWeights" in model.loaded


def test_arguments_replace_the_sizes_that_go_with_a_name_of_torchvision():
    arguments = {"num_layers": 2, "hidden_dim": 24, "mlp_dim": 32, "dropout": 0.5}
    vit = build_model(ModelSettings(name="torchvision/vit_b_32", image_size=64, num_classes=7,
                                    arguments=arguments)).module
    layers = vit.encoder.layers
    assert len(layers) == 2 and layers[0].mlp[0].weight.shape == (32, 24) and vit.encoder.dropout.p == 0.5
    # the name says the rest
    assert layers[0].num_heads == 12 and vit.patch_size == 32


# --- mistakes ------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "prefix": ("hf", ["model.name=huggingface/vit"], "model.name must be one of deit, simmim, simmim_pretrain, or "
               "timm/NAME, hf/NAME, torchvision/NAME, got 'huggingface/vit'"),
    "size": ("timm", ["model.size=tiny"], "model.size must be null for model.name=timm/" + TIMM + ": what the library "
             "calls it goes into model.arguments, got 'tiny'"),
    "distilled": ("hf", ["model.is_distilled=true"], "model.is_distilled must be false for model.name=hf/"),
    "own_argument": ("timm", ["model.arguments.img_size=32"], "model.arguments.img_size must be set as "
                     "model.image_size"),
    "own_argument_hf": ("hf", ["model.arguments.num_labels=3"], "model.arguments.num_labels must be set as "
                        "model.num_classes"),
    "drop_path_torchvision": ("torchvision", ["model.drop_path=0.1"], "model.drop_path must be null for model.name="),
    "cnn_torchvision": ("torchvision", ["model.name=torchvision/resnet18"], "model.name must be a ViT of torchvision, "
                        "like torchvision/vit_b_16, got 'torchvision/resnet18'"),
    "name": ("timm", ["model.name=timm/vit_small_patch16_225"], "model.name must be a model of timm, got "
             "'timm/vit_small_patch16_225'; did you mean timm/vit_small_patch16_224?"),
    "tag": ("timm", ["model.name=timm/vit_small_patch16_224.nope"], "model.name must be a model of timm with one of "
            "its tags, got 'timm/vit_small_patch16_224.nope'; there are vit_small_patch16_224.augreg_in1k, "),
    "name_torchvision": ("torchvision", ["model.name=torchvision/vit_b_17"], "model.name must be a ViT of torchvision, "
                         "got 'torchvision/vit_b_17'; did you mean torchvision/vit_b_16?"),
    "folder": ("hf", ["model.name=hf/./nowhere"], "model.name must be a folder with a config.json of transformers, got "
               "'hf/./nowhere'"),
    "no_hub": ("hf", ["model.name=hf/facebook/dinov2-small"], "model.name needs facebook/dinov2-small's config.json "
               "from http://127.0.0.1:9, which cannot be reached ("),
    "no_hub_timm": ("timm", ["model.pretrained=true"], f"model.pretrained needs timm's {TIMM} from http://127.0.0.1:9, "
                    "which cannot be reached ("),
    "arguments": ("timm", ["model.arguments.foo=1"], "model.arguments must be what timm/" + TIMM + " takes, got "),
    "no_blocks": ("hf", ["model.arguments.num_hidden_layers=0"], "optimizer.layer_decay must be null for ViTForImageC"),
    "no_hub_torchvision": ("torchvision", ["model.pretrained=true"], "model.pretrained needs file:///nowhere, which "
                           "cannot be reached ("),
    "unknown_model_hf": ("hf", ["model.name=hf/{tmp}"], "model.name must be a model of transformers, got 'hf/"),
    "arguments_hf": ("hf", ["model.arguments.hidden_sizes=1"], "model.arguments.hidden_sizes is not a setting of hf/"),
    "arguments_torchvision": ("torchvision", ["model.arguments.foo=1"], "model.arguments must be what "
                              "torchvision/vit_tiny_pss takes, got {'foo': 1}: "),
    "drop_path_hf": ("hf", ["model.drop_path=0.1"], "model.drop_path must be null for hf/"),
    "image_size": ("timm", ["model.image_size=30"], "model.image_size must be a multiple of the patch size 4 of timm/"
                   + TIMM + ", got 30"),
    "image_size_torchvision": ("torchvision", ["model.image_size=30"], "model.image_size must be a multiple of the "
                               "patch size 4 of torchvision/vit_tiny_pss, got 30"),
    "heads_torchvision": ("torchvision", ["model.arguments.num_heads=3"], "model.arguments must be what "
                          "torchvision/vit_tiny_pss takes, got {'num_heads': 3}: embed_dim must be divisible by num"),
    "swin": ("timm", ["model.name=timm/swin_tiny_patch4_window7_224", "model.arguments={{}}", "model.image_size=224"],
             "model.name must be a ViT that patch sampling fits into unless pss=null, got "
             "'timm/swin_tiny_patch4_window7_224': "),
    "patch_drop": ("timm", ["model.arguments.patch_drop_rate=0.5"], "model.arguments.patch_drop_rate must be 0 under "
                   "patch sampling, got "),
    "file": ("timm", ["model.pretrained={tmp}/nothing.pth"], "model.pretrained must be readable, "),
    "own_model": ("timm", ["model.name=deit", "model.arguments=null", "model.pretrained=true"], "model.pretrained must "
                  "be a file, a folder or null for model.name=deit, got True"),
    "own_model_arguments": ("timm", ["model.name=simmim", "model.pretrained=null"], "model.arguments must be null for "
                            "model.name=simmim, got {"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line(case, tmp_path, no_hub):
    library, overrides, message = BAD_INPUT[case]
    arguments = smoke_library(library, tmp_path / "run", *(each.format(tmp=tmp_path) for each in overrides))
    (tmp_path / "config.json").write_text("{}")
    if case == "swin":
        arguments = [each for each in arguments if not each.startswith(("model.arguments.", "model.patch_size"))]
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    code = exit_info.value.code
    assert code.startswith(f"error: {message}") and "\n" not in code and len(code) < 600
    assert not (tmp_path / "run").exists()


def test_weights_that_the_hub_does_not_give_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reset_sessions()
    with pytest.raises(SystemExit, match="^error: model.pretrained must be weights of timm/.* that can be loaded, got "
                                         "True: "):
        main(smoke_library("timm", tmp_path / "run", "model.pretrained=true"))
    reset_sessions()


def test_a_cnn_trains_on_all_of_its_pixels_and_is_not_evaluated_at_keep_rates(tmp_path):
    arguments = smoke_library("timm", tmp_path / "run", "model.name=timm/test_byobnet", "model.patch_size=null",
                              "pss=null", "model.image_size=32", "ema.smoothing=0.5")
    main([each for each in arguments if not each.startswith("model.arguments.")])
    assert len([line for line in read_log(tmp_path / "run") if "loss/train/total" in line]) == 2
    with pytest.raises(InputError, match="^run must be of a ViT that patch sampling fits into, .* is of timm/test_by"):
        load_run(tmp_path / "run")
    for ema in (False, True):  # one of the two is without buffers in the checkpoint
        export_weights(tmp_path / "run", tmp_path / f"{ema}.safetensors", ema=ema)
        timm.create_model("test_byobnet", num_classes=7).load_state_dict(load_file(tmp_path / f"{ema}.safetensors"))


def test_a_cnn_without_a_list_of_blocks_trains_too(tmp_path):
    arguments = smoke_library("timm", tmp_path / "run", "model.name=timm/dla46x_c", "model.patch_size=null",
                              "pss=null")
    arguments = [each for each in arguments if each.split("=")[0] not in
                 ("model.arguments.embed_dim", "model.arguments.depth", "model.arguments.num_heads")]
    with pytest.raises(SystemExit, match="^error: model.drop_path must be null for timm/dla46x_c, which has no "
                                         "drop_path_rate, got 0.1$"):
        main(arguments)
    arguments.append("model.drop_path=null")
    main(arguments)
    assert len([line for line in read_log(tmp_path / "run") if "loss/train/total" in line]) == 2
    with pytest.raises(SystemExit, match="^error: activation_checkpointing must be false for timm's DLA: "):
        main([*arguments, f"save_folder={tmp_path / 'other'}", "activation_checkpointing=true"])


def test_a_library_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "pss_composer.models.transformers", raising=False)
    message = "error: model.name needs transformers, which is not installed: pip install transformers"
    with pytest.raises(SystemExit) as exit_info:
        main(smoke_library("hf", tmp_path / "run"))
    assert exit_info.value.code == message


def test_a_run_from_before_there_were_library_models_goes_on(tmp_path):
    arguments = smoke("deit_small_224_pss", tmp_path, "autoresume=true")
    arguments.remove("model.patch_size=4")  # 16 by default
    main(arguments)
    path = tmp_path / "recipe.yaml"
    recipe = OmegaConf.load(path)
    # as `ModelSettings` had it
    expected = {"size": "small", "image_size": 32, "patch_size": 16, "num_classes": 7, "drop_path": 0.1,
                "embed_dim": 16, "depth": 2, "num_heads": 2, "name": "deit", "pretrained": None, "is_distilled": False,
                "relative_position_bias": False}
    assert OmegaConf.to_container(recipe.model) == {**expected, "arguments": None}
    recipe.model = expected
    OmegaConf.save(recipe, path)
    assert load_run(tmp_path).model.vit.embed_dim == 16
    main(arguments)  # at its end: nothing to do, and nothing to refuse


# --- what a run does with it ---------------------------------------------------------------------------------------


def name_groups(model, **settings):
    """Of every parameter: its share of the learning rate, and its weight decay."""
    optimizer = build_optimizer(model, OptimizerSettings(lr=1.0, weight_decay=0.1, **settings), 1)
    names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups for parameter in group["params"]}


HF_BLOCKS = "vit.encoder.layer" if transformers.__version__.startswith("4.") else "vit.layers"
LAYERS = {
    "timm": {"cls_token": 0, "patch_embed.proj.weight": 0, "blocks.0.mlp.fc1.weight": 1, "blocks.1.norm1.weight": 2,
             "norm.weight": 2, "head.weight": 3, "head.bias": 3},
    "hf": {"vit.embeddings.cls_token": 0, "vit.embeddings.patch_embeddings.projection.weight": 0,
           f"{HF_BLOCKS}.0.layernorm_after.weight": 1, f"{HF_BLOCKS}.1.layernorm_before.weight": 2,
           "vit.layernorm.weight": 2, "classifier.weight": 3, "classifier.bias": 3},
    "torchvision": {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.weight": 0,
                    "encoder.layers.encoder_layer_0.mlp.0.weight": 1, "encoder.layers.encoder_layer_1.ln_1.bias": 2,
                    "encoder.ln.weight": 2, "heads.head.weight": 3},
}
EXEMPT = {"timm": {"cls_token", "pos_embed"}, "hf": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
          "torchvision": {"class_token", "encoder.pos_embedding"}}


@pytest.mark.parametrize("library", LIBRARIES)
def test_layer_decay_and_weight_decay(library, tmp_path):
    model = build_model(load(smoke_library(library, tmp_path)).model)
    shapes = {name.removeprefix("module."): weight.ndim for name, weight in model.named_parameters()}
    groups = name_groups(model, layer_decay=0.5)
    assert groups.keys() == shapes.keys() == name_groups(model).keys()
    for name, layer in LAYERS[library].items():
        assert groups[name][0] == 0.5 ** (3 - layer), name
    for grouped in (groups, name_groups(model)):
        decayed = {name for name, (_, weight_decay) in grouped.items() if weight_decay == 0.1}
        assert decayed == {name for name, ndim in shapes.items() if ndim > 1} - EXEMPT[library]


@pytest.mark.parametrize("library", LIBRARIES)
def test_activation_checkpointing_changes_nothing(library, tmp_path):
    losses = []
    for overrides in ([], ["activation_checkpointing=true", "microbatch_size=8"]):
        folder = tmp_path / str(len(losses))
        main(smoke_library(library, folder, *overrides, *(["model.drop_path=0"] if library == "timm" else [])))
        losses.append([line["loss/train/total"] for line in read_log(folder) if "loss/train/total" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_activation_checkpointing_recomputes_every_block(library, tmp_path):
    model = build_model(load(smoke_library(library, tmp_path)).model)
    is_block = model.vit.activation_checkpointing_fn
    blocks = [module for module in model.modules() if is_block(module)]
    assert len(blocks) == 2 and all(model.vit.fsdp_wrap_fn(block) for block in blocks)
    model.enable_activation_checkpointing()
    calls = []
    for block in blocks:
        norm = next(module for module in block.modules() if isinstance(module, torch.nn.LayerNorm))
        norm.forward = lambda tokens, forward=norm.forward: calls.append(0) or forward(tokens)
    model.train()((random_images(), None)).sum().backward()
    assert len(calls) == 4


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_autoresume_is_exact_and_needs_neither_hub_nor_weights(library, tmp_path, monkeypatch):
    path = save_pth(build(library), tmp_path / "weights.pth")
    overrides = ["max_duration=4ba", "autoresume=true", "ema.smoothing=0.5", f"model.pretrained={path}"]
    straight = train(load(smoke_library(library, tmp_path / "straight", *overrides)))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        # called with the trainer right before its fit, and without effect on a fresh run
        patch.setattr(training, "restore_generators", lambda trainer: trainer.state.callbacks.append(StopAt(3)))
        train(load(smoke_library(library, tmp_path / "stopped", *overrides)))
    path.unlink()
    arguments = smoke_library(library, tmp_path / "stopped", *overrides)
    if library == "hf":  # the run has the configuration
        (tmp_path / "stopped_hf" / "config.json").unlink()
    resumed = train(load(arguments))
    assert resumed.state.timestamp.batch == 4
    for name, weight in straight.state.model.state_dict().items():
        assert torch.equal(weight, resumed.state.model.state_dict()[name]), name


class StopAt(Callback):
    def __init__(self, batch):
        self.batch = batch

    def batch_start(self, state, logger):
        if state.timestamp.batch == self.batch:
            raise Killed


@pytest.fixture(scope="module", params=LIBRARIES)
def run(request, tmp_path_factory):
    """A library, and the folder of a run under EMA."""
    folder = tmp_path_factory.mktemp("run") / request.param
    main(smoke_library(request.param, folder, "ema.smoothing=0.5", "activation_checkpointing=true"))
    return request.param, folder


def load_into_library(library, out):
    """What `export-checkpoint` wrote, in a model that the library alone builds; strictly."""
    if library == "hf":
        model, info = transformers.AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        return model.eval()
    model = build(library)
    model.load_state_dict(load_file(out), strict=True)
    return model.eval()


@pytest.mark.parametrize("ema", [False, True])
def test_export(run, ema, tmp_path):
    library, folder = run
    out = tmp_path / ("exported" if library == "hf" else "exported.safetensors")
    report = export_weights(folder, out, ema=ema)
    assert "by the library's names" in report and list(tmp_path.iterdir()) == [out]
    exported = load_into_library(library, out)
    images = random_images()
    trained = torch.load(folder / "latest-rank0.pt", weights_only=False)["state"]
    (averages,) = [state for name, state in trained["algorithms"] if name == "EMA"]
    assert averages["ema_weights_active"]  # then the model in the checkpoint is the average
    weights = trained["model"]
    if not ema:  # torch puts a module around each of torchvision's blocks
        weights = weights | {name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight
                             in averages["ema_model"]["named_parameters_dict"].items()}
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, weights[f"module.{name}"]), name
    if ema:
        expected = load_run(folder).model.eval()((images, None))
        torch.testing.assert_close(read_logits(exported, images), expected)


def test_bad_arguments_of_export(run, tmp_path):
    library, folder = run
    right, wrong = ("out", "out.safetensors") if library == "hf" else ("out.safetensors", "out")
    with pytest.raises(InputError, match=r"^out must be a new f.* for a run with .*, got "):
        export_weights(folder, tmp_path / wrong)
    with pytest.raises(InputError, match="^image_size must be left out for a run with "):
        export_weights(folder, tmp_path / right, image_size=64)
    with pytest.raises(InputError, match="^out must be a file that can be written, "):
        export_weights(folder, tmp_path / "nowhere" / right)
    assert not list(tmp_path.iterdir())


def test_evaluation_and_pictures(run, tmp_path, capsys):
    library, folder = run
    if library == "hf":
        (folder.parent / "hf_hf" / "config.json").unlink(missing_ok=True)  # the run has it
    cli.main(["evaluate", str(folder), "--keep-rates", "1", "0.5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:4]] == ["1.0", "0.5"] and 0.3 < float(rows[3][1]) < 0.7
    plot_kept_patches(load_run(folder), tmp_path / "patches.png", keep_rates=(1.0, 0.5))
    assert (tmp_path / "patches.png").stat().st_size > 1000


def test_load_path_takes_a_checkpoint_of_the_same_model_alone(run, tmp_path):
    library, folder = run
    load_path = [f"load_path={folder}", "load_weights_only=true", "ema.smoothing=0.5"]
    trainer = build_trainer(load(smoke_library(library, tmp_path / "run", *load_path)))
    saved = torch.load(folder / "latest-rank0.pt", weights_only=False)["state"]["model"]
    for name, weight in trainer.state.model.state_dict().items():
        assert torch.equal(weight, saved[name]), name
    with pytest.raises(InputError, match=r"^load_path must be of the same model, .* differs in .*head|classifier"):
        build_trainer(load(smoke_library(library, tmp_path / "run", *load_path, "model.num_classes=9")))


# --- the families of transformers ----------------------------------------------------------------------------------

SMALL = {key: value for key, value in HF_CONFIG.items() if key != "model_type"}
SIGLIP2 = {key: value for key, value in SMALL.items() if key != "image_size"} | {"num_patches": 64}
FAMILIES = {
    "ViT": SMALL, "DeiT": SMALL, "Dinov2": SMALL, "Dinov2WithRegisters": SMALL, "DINOv3ViT": SMALL,
    "Beit": SMALL | {"use_relative_position_bias": True}, "Siglip": {"vision_config": SMALL},
    "CLIP": {"vision_config": SMALL}, "CLIPVision": SMALL, "SiglipVision": SMALL, "ViTMSN": SMALL, "IJepa": SMALL,
    "Siglip2": {"vision_config": SIGLIP2}, "Siglip2Vision": SIGLIP2,
}
UNUSED = {"Dinov2": ["mask_token"], "Dinov2WithRegisters": ["mask_token"], "DINOv3ViT": ["mask_token"],
          "Siglip": ["vision_model.head"], "Siglip2": ["vision_model.head"], "CLIP": ["post_layernorm"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name, tmp_path):
    getattr(transformers, f"{name}Config")(**FAMILIES[name]).save_pretrained(tmp_path / "config")
    model = build_model(ModelSettings(name=f"hf/{tmp_path / 'config'}", num_classes=7, image_size=32))
    apply_patch_sampling(model, keep_rate=0.5)
    model.train()
    images, labels = random_images(), torch.arange(3)
    logits = model((images, labels))
    assert logits.shape == (3, 7)
    model.loss(logits, (images, labels)).backward()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    # what is trained has a gradient, as DDP needs it
    assert frozen == {name for name, weight in model.named_parameters() if weight.grad is None}
    assert all(any(part in each for part in UNUSED.get(name, [])) for each in frozen)
    assert bool(frozen) == (name in UNUSED)
    layers = {name: layer for name, layer in name_groups(model, layer_decay=0.5).items()}
    assert {layer for layer, _ in layers.values()} == {0.125, 0.25, 0.5, 1.0}


def save_weights(model_class, folder, **settings):
    """A folder of transformers with random weights; the model."""
    model = getattr(transformers, model_class)
    model = model(model.config_class(**settings)).eval()
    model.save_pretrained(folder)
    return model


def build_from(folder, **settings):
    return build_model(ModelSettings(name=f"hf/{folder}", pretrained=str(folder), num_classes=7,
                                     **{"image_size": 32} | settings))


def test_the_head_of_a_vision_model_without_one_is_random_and_not_whatever_was_in_memory(tmp_path):
    save_weights("CLIPVisionModel", tmp_path / "clip", **SMALL)
    head = build_from(tmp_path / "clip").module.classifier
    assert 0.015 < head.weight.std() < 0.025 and not head.bias.any()


def test_the_positions_of_a_vision_model_without_a_head_are_interpolated(tmp_path):
    original = save_weights("SiglipVisionModel", tmp_path / "siglip", **SMALL)
    model = build_from(tmp_path / "siglip", image_size=48).eval()
    images = torch.randn(2, 3, 48, 48)
    pooled = original(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(model((images, None)), model.module.classifier(pooled))


def test_the_norm_of_mean_pooling_is_new_where_weights_of_pre_training_lack_it(tmp_path):
    save_weights("BeitForMaskedImageModeling", tmp_path / "beit", **SMALL, vocab_size=9)
    assert ("left at initial values: 4 (beit.pooler.layernorm.bias, beit.pooler.layernorm.weight, classifier.bias, "
            "classifier.weight)") in build_from(tmp_path / "beit").loaded


def test_what_is_dropped_is_named_once_for_all_blocks(tmp_path):
    text = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    save_weights("CLIPModel", tmp_path / "clip", vision_config=SMALL, text_config=text | {"vocab_size": 9})
    dropped = next(line for line in build_from(tmp_path / "clip").loaded.splitlines() if line.startswith("dropped: "))
    assert "text_model.encoder.layers.*.mlp.fc1.weight (2 x), " in dropped and "layers.0" not in dropped


def test_the_configuration_of_a_run_names_the_class_of_its_model(tmp_path):
    save_weights("DeiTForImageClassificationWithTeacher", tmp_path / "deit", **SMALL)
    model = build_from(tmp_path / "deit")
    assert model.module.config.architectures == ["DeiTForImageClassification"] == [type(model.module).__name__]


@pytest.mark.parametrize(("model_class", "rule"), [
    ("ViTMAEModel", "must be a classifier or a model with a pooled output, ViTMAEModel of transformers is neither"),
    ("VivitModel", "must be an image model of transformers, got 'hf/.*' with a VivitConfig"),
])
def test_models_of_transformers_that_are_no_image_classifiers_are_refused(model_class, rule, tmp_path):
    save_weights(model_class, tmp_path / "model", **SMALL)
    with pytest.raises(InputError, match=f"^model.name {rule}$"):
        build_from(tmp_path / "model")


def test_weights_of_another_architecture_say_so(tmp_path):
    for model_class, name in (("ViTForImageClassification", "vit"), ("Dinov2ForImageClassification", "dinov2")):
        save_weights(model_class, tmp_path / name, **SMALL)
    # transformers 4.57 calls the file corrupt; 5 tells what is missing
    with pytest.raises(InputError, match=r"^model.pretrained must be of the model's architecture, .*/dinov2 (is of a "
                                         "dinov2, hf/.*/vit of a vit|has no vit.embeddings.cls_token)$"):
        build_model(ModelSettings(name=f"hf/{tmp_path / 'vit'}", pretrained=str(tmp_path / "dinov2"), image_size=32))


def test_a_folder_of_weights_needs_no_configuration(tmp_path):
    save_weights("ViTForImageClassification", tmp_path / "vit", **SMALL)
    (tmp_path / "weights").mkdir()
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "weights" / "model.safetensors")
    model = build_model(ModelSettings(name=f"hf/{tmp_path / 'vit'}", pretrained=str(tmp_path / "weights"),
                                      image_size=32, num_classes=7))
    assert "left at initial values: 2 (classifier.bias, classifier.weight)" in model.loaded


def test_siglip_2_sees_the_patches_as_its_processor_cuts_them(tmp_path):
    transformers.Siglip2Config(**FAMILIES["Siglip2"]).save_pretrained(tmp_path / "config")
    model = build_model(ModelSettings(name=f"hf/{tmp_path / 'config'}", num_classes=7, image_size=32)).eval()
    images = random_images()
    # of 4 x 4 pixels, row by row, the channels of a pixel side by side
    patches = [images[:, :, top:top + 4, left:left + 4].permute(0, 2, 3, 1).flatten(1)
               for top in range(0, 32, 4) for left in range(0, 32, 4)]
    expected = model.module(pixel_values=torch.stack(patches, dim=1), pixel_attention_mask=torch.ones(3, 64),
                            spatial_shapes=torch.full((3, 2), 8)).logits
    torch.testing.assert_close(model((images, None)), expected)
