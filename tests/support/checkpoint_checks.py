"""What the tests of checkpoints assert: about models that hold their weights, reports, and refusals."""

import json
import re
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from pss_composer.errors import InputError
from support.checkpoint_files import PRETRAINING_VECTORS, reference_images

CLASSES = {vit_class.__name__: vit_class for vit_class in (Beit, VisionTransformer, VisionTransformerDistilled)}
TITLES = {"loaded", "copied from the shared bias table", "interpolated", "dropped", "left at initial values"}
PRETRAINING_ONLY = {"mask_token", "decoder.weight", "decoder.bias", "encoder.rel_pos_bias.relative_position_index"}


def refuse(function, *arguments, key="checkpoint", **options):
    """The message of a function that refuses its arguments, in one short line."""
    with pytest.raises(InputError) as error:
        function(*arguments, **options)
    message = str(error.value)
    assert error.value.key == key and message.startswith(f"{key} ") and len(message) < 500
    assert not re.search(r"[\n\x1b]|Traceback|add_safe_globals|likely succeed|trusted", message)
    return message


def read_timm_arguments(path):
    """The name of the timm class in a file's metadata, and its arguments."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["timm"])
    return description["class"], description["arguments"]


def load_into_timm(path, **arguments):
    """The timm model in a file's metadata, with its weights; the arguments are those that weights do not show."""
    name, described = read_timm_arguments(path)
    unknown = {name for name, value in described.items() if value is None and name != "init_values"}
    assert unknown == set(arguments)
    model = CLASSES[name](**described | arguments)
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def read_account(report):
    """The title of a line -> its names, those of the blocks taken together -> how often; and the counts add up."""
    account = {title: Counter() for title in TITLES}
    for line in report.splitlines():
        title, _, names = line.partition(": ")
        if title in TITLES:
            total, names = re.fullmatch(r"(\d+) \((.*)\)", names).groups()
            account[title] = Counter({name: int(count or 1) for name, count in
                                      re.findall(r"([\w.*]+)(?: \((\d+) x\))?(?:, |$)", names)})
            assert account[title].total() == int(total)
    return account


def together(names):
    return Counter(re.sub(r"blocks\.\d+", "blocks.*", name) for name in names)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def assert_same(state_dict, expected):
    assert state_dict.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state_dict[name], weight), name


def copy_weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_reconstructs(model):
    """The model paints what the original painted, with the same loss."""
    batch = PRETRAINING_VECTORS.get_tensor("input"), PRETRAINING_VECTORS.get_tensor("mask").bool()
    outputs = model(batch)
    assert_close(model.unpatchify(outputs.pixels), PRETRAINING_VECTORS.get_tensor("reconstruction"))
    assert_close(model.loss(outputs, batch), PRETRAINING_VECTORS.get_tensor("loss"))


def logits_of(model, name):
    return model.eval()(reference_images(name)).detach()
