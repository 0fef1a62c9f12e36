"""Out of torch: exported programs give the model's logits at each fixed keep rate, also at other batch sizes."""

import io
import pickle

import numpy as np
import onnxruntime
import pytest
import torch
from composer.utils import export_for_inference
from support.models import FAMILIES, build_model, random_images

from pss_composer import apply_patch_sampling
from pss_composer.models.deit import DeiT
from pss_composer.models.shape import ViTShape

# a ViT without and with biases: a block's own, and one that all share
NAMES = ["vit", "beit", "beit_shared"]
every_name = pytest.mark.parametrize("name", NAMES)
BATCHES = {0: torch.export.Dim("batch", min=1, max=64)}
pytestmark = [
    # a trace holds what was a number in Python: the size that timm checks, and how many tokens stay
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # torch's exporters, of functions of torch; and torch.jit, of an attribute of torchmetrics
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This property will be removed:DeprecationWarning"),
]


def build(name, keep_rate, *, sampler="magnitude"):
    # with a bias that needs a gradient, torch 2.7 cannot export an untouched Beit to ONNX either
    model = build_model(name).eval().requires_grad_(False)
    return model, apply_patch_sampling(model, sampler=sampler, eval_keep_rate=keep_rate)


def assert_same(run, model):
    """Images that the exporter has not seen, and another number of them."""
    for batch_size in (3, 5):
        images = random_images(batch_size, seed=2)
        torch.testing.assert_close(run(images), model(images), atol=1e-5, rtol=1e-5)


def open_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(np.asarray(session.run(None, {name: images.numpy()})[0]))


@every_name
def test_export(name):
    """One model at one keep rate after the other; a program keeps that of its own."""
    model, sampler = build(name, 1.0)
    programs = {}
    for keep_rate in (0.4, 1.0):
        sampler.eval_keep_rate = keep_rate
        programs[keep_rate] = torch.export.export(
            model, (random_images(),), strict=True, dynamic_shapes=(BATCHES,)
        ).module()
    for keep_rate, program in programs.items():
        sampler.eval_keep_rate = keep_rate
        assert_same(program, model)


@pytest.mark.parametrize("name", ["dinov3", "relpos", "torchvision", "hf_dinov2", "hf_beit_own_bias"])
# torch's, of a constant (the table of transformers' Beit); an untouched one makes it warn, too
@pytest.mark.filterwarnings("ignore:(Attempted to insert a get_attr|Node|Additional):UserWarning")
def test_other_families(name):
    model, _ = build(name, 0.4)

    class Run(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return FAMILIES[name].run(self.model, images)

    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch exports no nn.MultiheadAttention with it
    try:
        program = torch.export.export(Run(), (random_images(),), strict=True, dynamic_shapes=(BATCHES,)).module()
        assert_same(program, Run())
        assert_same(torch.jit.trace(Run(), random_images()), Run())
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_itself_after_an_export(strict):
    model, sampler = build("beit", 0.4)
    logits = model(random_images())
    torch.export.export(model, (random_images(),), strict=strict)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(random_images()), logits)
    assert torch.equal(model(random_images()), logits)
    assert sampler.keep_indices.shape == (3, 25)  # 0.4 of 65 tokens, less the class token


def test_export_in_training_mode():
    model = build_model("beit").train()
    apply_patch_sampling(model, keep_rate=0.6)
    program = torch.export.export(model, (random_images(),), strict=True, dynamic_shapes=(BATCHES,)).module()
    assert_same(program, model)


@every_name
@pytest.mark.parametrize("keep_rate", [1.0, 0.4])
def test_trace(name, keep_rate):
    model, _ = build(name, keep_rate)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, random_images()), file)
    file.seek(0)
    assert_same(torch.jit.load(file), model)


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_onnx(name, tmp_path):
    model, _ = build(name, 0.4)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (random_images(),), path, dynamo=True, verbose=False, dynamic_shapes=(BATCHES,))
    assert_same(open_onnx(path), model)


@every_name
@pytest.mark.parametrize("keep_rate", [1.0, 0.4])
def test_onnx_by_trace(name, keep_rate, tmp_path):
    model, _ = build(name, keep_rate)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (random_images(),), path, dynamo=False, input_names=["images"],
                      dynamic_axes={"images": {0: "batch"}})
    assert_same(open_onnx(path), model)


@pytest.mark.parametrize("sampler", ["random", lambda tokens, k: tokens[..., 0].argsort(dim=1)[:, :k]],
                         ids=["random", "function"])
def test_other_samplers(sampler):
    """The random one draws in the program, too."""
    model, _ = build("vit", 0.4, sampler=sampler)
    images = random_images()
    traced = torch.jit.trace(model, images, check_trace=False)
    program = torch.export.export(model, (images,), strict=True, dynamic_shapes=(BATCHES,)).module()
    if sampler != "random":
        assert_same(traced, model)
        assert_same(program, model)
        return
    for run in (traced, program):
        assert run(random_images(5)).shape == (5, 7)
        assert not torch.equal(run(images), run(images))


@pytest.mark.parametrize("save_format", ["torchscript", "onnx"])
def test_composers_export_for_inference(save_format, tmp_path):
    shape = ViTShape(size="tiny", image_size=32, patch_size=4, num_classes=7, embed_dim=32, depth=2, num_heads=4)
    model = DeiT(shape).eval().requires_grad_(False)
    apply_patch_sampling(model, eval_keep_rate=0.4)
    path, batch = tmp_path / "model", (random_images(), torch.zeros(3, dtype=torch.int64))
    export_for_inference(model=model, save_format=save_format, save_path=str(path), sample_input=(batch,),
                         dynamic_axes={"input": {0: "batch"}})
    if save_format == "onnx":
        assert_same(open_onnx(path), model.vit)
    else:
        program = torch.jit.load(path)
        assert_same(lambda images: program((images, batch[1])), model.vit)
