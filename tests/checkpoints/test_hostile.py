"""Hostile files: nothing in them is run, and they are refused in one line."""

import argparse
import pickle
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
import yacs.config
from support.checkpoint_checks import assert_same, copy_weights, refuse
from support.checkpoint_files import BUILD, FORMATS, save, simmim_file
from support.hostile import CALLS, Hostile
from torch.distributed.device_mesh import DeviceMesh
from yacs.config import CfgNode

from pss_composer.checkpoints.export import export_weights
from pss_composer.checkpoints.reading import read_file
from pss_composer.checkpoints.transfer import load_pretrained


def put_in_config(contents, hostile):
    contents["config"]["MODEL"]["VIT"]["EXTRA"] = [{"deep": (hostile,)}]


def put_in_place_of_a_tensor(contents, hostile):
    contents["model"]["blocks.1.norm1.weight"] = hostile


def put_in_a_key(contents, hostile):
    contents["optimizer"]["state"][hostile] = 1


def put_in_arguments(contents, hostile):
    contents["args"] = argparse.Namespace(lr=0.1, extra=hostile)


def put_in_an_attribute(contents, hostile):
    contents["model"]._metadata = hostile


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("put", "call"), [
    *((put_in_config, call) for call in CALLS),
    *((put, "posix.system") for put in (put_in_place_of_a_tensor, put_in_a_key, put_in_arguments, put_in_an_attribute)),
])
def test_a_hostile_file_does_nothing(tmp_path, out, put, call, kind):
    marker = tmp_path / "marker"
    contents = simmim_file("simmim")
    put(contents, CALLS[call](marker))
    path = save(contents, tmp_path / "file.pth", kind)
    message = refuse(export_weights, path, out)
    assert f"{path} asks for {call}: refused, and nothing of it was run" in message
    model = BUILD["simmim"]()
    before = copy_weights(model)
    assert "refused" in refuse(load_pretrained, model, path)
    assert_same(model.state_dict(), before)
    assert not marker.exists() and not list(out.parent.iterdir())
    if call != "getattr":
        torch.load(path, weights_only=False)
        assert marker.exists()  # so it was hostile


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_pickles_of_other_protocols_do_nothing(tmp_path, out, protocol):
    marker = tmp_path / "marker"
    torch.save({"config": CALLS["posix.system"](marker)}, tmp_path / "file.pth", pickle_protocol=protocol)
    assert re.search("cannot be read|asks for posix.system", refuse(export_weights, tmp_path / "file.pth", out))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(CALLS["posix.system"](marker), protocol))
    assert "must be a file of torch.save" in refuse(export_weights, tmp_path / "plain.pth", out)
    assert not marker.exists()


def test_what_others_allow_torch_is_refused_too(tmp_path, out):
    """torch.distributed allows classes of its own, and so may any library."""
    with torch.serialization.safe_globals([CfgNode, Path]):
        before = torch.serialization.get_safe_globals()
        assert DeviceMesh in before
        for function, name in [(DeviceMesh, "torch.distributed.tensor"), (Path, r"pathlib.(\w+\.)?Path")]:
            path = save({"config": Hostile(function, "cpu")}, tmp_path / "file.pth")
            assert re.search(rf"asks for {name}: refused", refuse(export_weights, path, out))
        contents = read_file(save(simmim_file("simmim"), tmp_path / "file.pth"))
        assert type(contents["config"]) is not CfgNode
        assert set(torch.serialization.get_safe_globals()) == set(before)


def test_objects_of_harmless_classes_are_not_made(tmp_path, monkeypatch):
    contents = simmim_file("simmim") | {"args": argparse.Namespace(lr=0.1)}
    contents["config"]["numbers"] = numpy.arange(3)
    path = save(contents, tmp_path / "file.pth")

    class Unused:
        def __new__(cls, *args, **kwargs):
            raise AssertionError("a harmless class was used")

    monkeypatch.setattr(argparse, "Namespace", Unused)
    monkeypatch.setattr(yacs.config, "CfgNode", Unused)
    for name in [name for name in sys.modules if name.startswith("yacs")]:
        monkeypatch.delitem(sys.modules, name)
    contents = read_file(path)
    assert not any(name.startswith("yacs") for name in sys.modules)
    stand_ins = [contents["config"], contents["config"]["MODEL"], contents["args"]]
    assert {type(stand_in).__module__ for stand_in in stand_ins} == {"pss_composer.checkpoints.reading"}
    assert not vars(contents["args"]) and not contents["args"]
