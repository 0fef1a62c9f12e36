"""Files that are broken, of another format, or of another kind of model: refused in one line."""

import re

import numpy
import pytest
import timm
import torch
from safetensors.torch import save_file
from support.checkpoint_checks import refuse
from support.checkpoint_files import BUILD, save, simmim_file, vector_weights, with_weights, without_weight
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.transfer import load_pretrained


def swin():
    return SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 2))


def write(content):
    def build(path):
        path.write_bytes(content)
    return build


def cut(share, kind):
    def build(path):
        if kind == "safetensors":
            save_file(vector_weights("simmim"), path)
        else:
            save(simmim_file("simmim"), path, kind)
        content = path.read_bytes()
        path.write_bytes(content[:int(share * len(content))])
    return build


def save_arrays(path):
    with path.open("wb") as file:
        numpy.savez(file, weight=numpy.zeros(3))


def save_with_a_broken_pickle(path):
    content = save(simmim_file("simmim"), path).read_bytes()
    start = content.index(b"relative_position_bias_table")
    path.write_bytes(content[:start] + bytes(200) + content[start + 200:])


def save_script(path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def changed(name="simmim", **weights):
    return lambda path: save(with_weights({"model": vector_weights(name)}, **weights), path)


def renamed(prefix, other):
    return {name.replace(prefix, other): weight for name, weight in vector_weights("simmim").items()}


TABLE = "blocks__{}__attn__relative_position_bias_table"
BROKEN = {
    "html": (write(b"<!DOCTYPE html>\n<html>\n<body>\nNot found\n</body></html>"),
             "must be a file of torch.save or safetensors, .* begins with b'<!DOCTYPE"),
    "empty": (write(b""), "must be a file of torch.save or safetensors, .* begins with b''"),
    "text": (write(b"version https://git-lfs\n"),
             "must be a file of torch.save or safetensors, .* begins with b.version"),
    "zip-0.5": (cut(0.5, "zip"), "must be a whole file of torch.save, .* cannot be read"),
    "zip-0.999": (cut(0.999, "zip"), "must be a whole file of torch.save, .* cannot be read"),
    "legacy-0.001": (cut(0.001, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "legacy-0.5": (cut(0.5, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "legacy-0.999": (cut(0.999, "legacy"), "must be a whole file of torch.save, .* cannot be read"),
    "safetensors-0.5": (cut(0.5, "safetensors"), "must be a whole safetensors file, .* cannot be read"),
    "safetensors-0.01": (cut(0.01, "safetensors"), "must be a whole safetensors file, .* cannot be read"),
    "npz": (save_arrays, "must be a whole file of torch.save"),
    "broken-pickle": (save_with_a_broken_pickle, "must be a whole file of torch.save, .* cannot be read"),
    "script": (save_script, "must be a whole file of torch.save, .* TorchScript"),
    "list": (lambda path: save([torch.zeros(2)], path), "must hold a dictionary, .* holds a list"),
    "module": (lambda path: save({"model": nn.Linear(2, 2)}, path), "asks for torch.nn.modules.linear.Linear: refused"),
    "control-characters": (lambda path: save({"\x1b[2J\n" + 1000 * "a": 1}, path), "must hold weights under 'model'"),
    "numbers": (lambda path: save({0: torch.zeros(2), 1: torch.zeros(3)}, path), "must hold weights under 'model'"),
    "nothing": (lambda path: save({}, path), "must hold weights under 'model'.* holds \\[\\]"),
    "optimizer": (lambda path: save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, path),
                  "must hold weights under 'model'"),
    "composer": (lambda path: save({"state": {"model": [1], "algorithms": 3}}, path),
                 "must hold weights under 'model'"),
    "resnet": (lambda path: save({"model": timm.create_model("resnet18").state_dict()}, path),
               r"has no pos_embed, but \['conv1.weight"),
    "swin": (lambda path: save({"model": swin().state_dict()}, path),
             "must be of a ViT of timm's, .* relative_position_bias_table has 46 positions, which are not a square"),
    "missing-block": (lambda path: save(renamed("blocks.0.", "other."), path), "has no blocks.0.mlp.fc1.weight, but"),
    "gap": (lambda path: save(renamed("blocks.1.", "blocks.2."), path), "has nothing at blocks.1."),
    "far-block": (changed(blocks__999999999__norm1__weight=torch.zeros(32)), "blocks.2.* has"),
    "no-number": (changed(blocks__first__norm1__weight=torch.zeros(32)), "do not fit together"),
    "missing-weight": (lambda path: save(without_weight(simmim_file("simmim"), "blocks.1.mlp.fc2.bias"), path),
                       "has nothing at blocks.1.mlp.fc2.bias"),
    "extra-weight": (changed(blocks__1__mlp__fc3__bias=torch.zeros(3)), r"has \(3,\) at blocks.1.mlp.fc3.bias"),
    "width": (changed(blocks__1__mlp__fc1__weight=torch.zeros(64, 32)), r"has \(64, 32\) at blocks.1.mlp.fc1.weight"),
    "positions": (changed("deit", pos_embed=torch.zeros(1, 63, 32)), r"has \(1, 63, 32\) at pos_embed"),
    "vit-positions": (changed("ape_cls", pos_embed=torch.zeros(1, 63, 32)), "pos_embed has 62 positions, which"),
    "other-grids": (changed("deit", pos_embed=torch.zeros(1, 50, 32)), r"has \(1, 50, 32\) at pos_embed"),
    "heads": (changed(**{TABLE.format(1): torch.zeros(228, 2)}), r"has \(228, 2\) at blocks.1.*table"),
    "all-heads": (changed(**{TABLE.format(block): torch.zeros(228, 3) for block in (0, 1)}),
                  r"has \(32,\) at blocks.0.attn.q_bias, a Beit\(.*num_heads=3.* has \(30,\)"),
    "no-heads": (changed(**{TABLE.format(block): torch.zeros(228, 0) for block in (0, 1)}), "do not fit together"),
    "table": (changed(**{TABLE.format(block): torch.zeros(230, 4) for block in (0, 1)}), "227 positions, which are"),
    "flat-table": (changed(**{TABLE.format(block): torch.zeros(228) for block in (0, 1)}), "do not fit together"),
    "scalars": (changed(head__weight=torch.tensor(1.0)), "do not fit together"),
    "stem": (changed(patch_embed__proj__weight=torch.zeros(32, 3, 4, 2)), "at patch_embed.proj.weight"),
    "no-patch": (changed("ape_cls", patch_embed__proj__weight=torch.zeros(32, 3, 0, 0)), "do not fit together"),
    "no-hidden": (changed(blocks__0__mlp__fc1__weight=torch.zeros(8, 0)), "do not fit together"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, out, name, recwarn):
    build, message = BROKEN[name]
    path = tmp_path / ("file.safetensors" if name.startswith("safetensors") else "file.pth")
    build(path)
    line = refuse(export_weights, path, out)
    assert re.search(message, line) and str(path) in line
    assert not list(out.parent.iterdir())
    assert not recwarn.list
    if name not in ("scalars", "stem"):  # a head is left behind, a stem interpolated
        refuse(load_pretrained, BUILD["simmim"](), path)


@pytest.mark.parametrize(("path", "message"), [
    ("{folder}/missing.pth", "must be readable, {folder}/missing.pth is not: No such file or directory"),
    ("/proc/self/mem", "must be readable, /proc/self/mem is not: Input/output error"),
    ("{folder}/" + 300 * "x", "must be readable, .* is not: File name too long"),
    ("{folder}", "must be a file, a folder of shards"),
])
def test_paths_that_are_not_checkpoints(tmp_path, out, path, message):
    path, message = (text.format(folder=tmp_path) for text in (path, message))
    assert re.search(f"^checkpoint {message}", refuse(export_weights, path, out))
    assert re.search(f"^checkpoint {message}", refuse(load_pretrained, BUILD["simmim"](), path))
    assert not list(out.parent.iterdir())
