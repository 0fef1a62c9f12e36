"""The README's code runs, and so do the examples."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT
from pss_composer.training.reading import load_recipe
from pss_composer.training.rules import build_schedule
from pss_composer.schedules import Cyclic

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["composer", "plain", "pretraining"])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a checkpoint
    exec(compile(code, "README.md", "exec"), {})


def test_yaml_block_is_the_default_schedule():
    (block,) = blocks("yaml")
    assert build_schedule(yaml.safe_load(block)["pss"]["schedule"]) == Cyclic()


def test_every_train_command_reads_its_recipe():
    commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines() if "train.py" in line]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)
        recipe, *overrides = words[words.index("train.py") + 1:]
        load_recipe(ROOT / recipe, overrides)


def test_every_variant_is_an_override():
    overrides = re.findall(r"^\| .* \| (`pss.*`) \|$", README, flags=re.MULTILINE)
    assert len(overrides) == 7
    for cell in overrides:
        for variant in re.findall("`(.*?)`", cell):
            load_recipe(ROOT / "yamls" / "simmim_vitb_pss.yaml", variant.split())


@pytest.mark.parametrize("name", ["composer_recipe", "plain_pytorch"])
def test_examples_run(name, capsys):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    # one epoch is enough to see that it runs
    short = source.replace("num_epochs, batch_size = 10, 32", "num_epochs, batch_size = 1, 32")
    short = short.replace('"10ep"', '"2ep"').replace('"5ep"', '"2ep"')
    assert short != source
    exec(compile(short, name, "exec"), {"__name__": "__main__"})
    assert "0." in capsys.readouterr().out
