"""README, docs and examples: their code runs, commands parse, links lead somewhere, and numbers agree."""

import dataclasses
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path
from statistics import mean

import lightning
import pytest
import torch
import yaml
from composer.models import ComposerClassifier
from support.models import build_model
from support.paths import ROOT, YAMLS
from torch.utils.data import DataLoader, TensorDataset

from pss_composer import cli, schedules
from pss_composer.schedules import Cyclic, keep_rates
from pss_composer.training.reading import load_recipe
from pss_composer.training.recipe import PSSSettings, Recipe
from pss_composer.training.run_folder import RECIPE_FILE

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"),
                *ROOT.glob("pss_composer/**/*.md")])
README, METHOD, RECIPES, DATA = (
    (ROOT / name).read_text() for name in ("README.md", "docs/method.md", "docs/recipes.md", "docs/data.md")
)
PACKAGE = ROOT / "pss_composer"
NUMBER = re.compile(r"\d+\.\d+")
LIGHTNING_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated", "ignore:Starting from v1.9.0, `tensorboardX` has been",
    "ignore:The number of training batches",
    "ignore:It is recommended to use `self.log",  # a test of Composer in this process leaves a process group
)


def blocks(language):
    return [pytest.param(page, code, id=f"{page.stem}{number}") for page in PAGES
            for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL))]


def commands():
    """Every line of the bash blocks, as words."""
    lines = [line for block in blocks("bash") for line in block.values[1].splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def table_rows(text, *, after):
    """The cells of the first table after a heading, without its head."""
    rows = re.search(r"^\|.*?(?=\n[^|]|\Z)", text[text.index(f"# {after}\n"):], flags=re.DOTALL | re.MULTILINE)[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]


def read_header(name):
    return (YAMLS / name).read_text().split("\n\n")[0]


# --- code and commands ---------------------------------------------------------------------------------------------


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = build_model("vit")

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.vit(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


@pytest.mark.slow
@LIGHTNING_WARNINGS
@pytest.mark.parametrize("page, code", blocks("python"))
def test_python_blocks_run(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a checkpoint
    names = {}
    if page.name in ("README.md", "integrations.md"):  # their blocks take the model of the reader
        model = ComposerClassifier(build_model("vit"), num_classes=7)
        data = TensorDataset(torch.randn(12, 3, 32, 32), torch.randint(7, (12,)))
        names = {"vit": build_model("beit"), "lightning_module": Classifier(), "model": model,
                 "train_dataloader": DataLoader(data, batch_size=4),
                 "optimizer": torch.optim.AdamW(model.parameters())}
    exec(compile(code, page.name, "exec"), names)
    if "Progress(step," in code:  # loops of two epochs of three batches, two of which are a step
        assert names["step"] == 4


def test_there_are_python_blocks_for_each_way():
    names = [block.id for block in blocks("python") if not block.id.startswith("families")]
    assert names == ["README0", "README1", *(f"integrations{number}" for number in range(5)), "method0", "method1",
                     "pretraining0"]


def test_yaml_block_is_the_default_schedule():
    (block,) = blocks("yaml")
    settings = PSSSettings(**yaml.safe_load(block.values[1])["pss"])
    assert settings.built_schedule == Cyclic() and settings == PSSSettings(schedule=settings.schedule)


def test_every_train_command_reads_its_recipe():
    recipes = [words[words.index("train.py") + 1:] for words in commands() if "train.py" in words]
    assert len(recipes) == 12
    for recipe, *overrides in recipes:
        load_recipe(ROOT / recipe, overrides)


def test_every_pss_command_parses(monkeypatch):
    called = []
    for name, function in list(vars(cli).items()):
        if inspect.isfunction(function) and list(inspect.signature(function).parameters) == ["options"]:
            monkeypatch.setattr(cli, name, called.append)
    # those in the text, too; what stands in capitals is the reader's
    inline = [shlex.split(code) for page in PAGES for code in re.findall("`pss ([a-z].*?)`", page.read_text())]
    lines = [words[1:] for words in commands() if words[0] == "pss"]
    assert len(lines) == 18 and len(inline) > 3
    known = []
    for words in [*lines, *(words for words in inline if len(words) > 1)]:
        cli.main(words)
        known.append(words[0])
        if words[0] == "train":
            load_recipe(words[1], words[2:])
    assert len(called) == len(known)
    for words in inline:
        assert words[0] in {*known, "clean-shared-memory", "import-checkpoint"}, words


def test_there_are_no_commands_of_another_kind():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()
    for words in commands():
        is_known = "train.py" in words or words[0] == "pss" or words[:2] == ["git", "clone"] or \
            words == [".venv/bin/pre-commit", "install"] or (words[0] == "make" and words[1] in targets)
        assert is_known, words


def test_every_benchmark_that_is_named_is_there():
    names = {name for page in PAGES for name in re.findall(r"python -m benchmarks\.(\w+)", page.read_text())}
    assert names == {path.stem for path in ROOT.glob("benchmarks/*.py")} - {"__init__"}


def test_every_variant_is_an_override():
    overrides = [row[1] for row in table_rows(RECIPES, after="Variants")]
    assert len(overrides) == 7
    for cell in overrides:
        for variant in re.findall("`(.*?)`", cell):
            load_recipe(ROOT / "yamls" / "simmim_vitb_pss.yaml", variant.split())


@pytest.mark.slow
@LIGHTNING_WARNINGS
@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("examples/*.py")))
def test_examples_run(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "examples" / f"{name}.py").read_text()
    # one epoch is enough to see that it runs
    short = source.replace("num_epochs, batch_size = 10, 32", "num_epochs, batch_size = 1, 32")
    short = short.replace('"10ep"', '"2ep"').replace('"5ep"', '"2ep"').replace("num_epochs = 10\n", "num_epochs = 1\n")
    assert short != source
    exec(compile(short, name, "exec"), {"__name__": "__main__"})
    assert re.search(r"keep rate 0.2: \d+\.\d %|0\.\d+", capsys.readouterr().out)


def test_the_figure_of_the_idea_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["idea.py", str(tmp_path / "idea.png")])
    runpy.run_path(str(ROOT / "docs" / "idea.py"), run_name="__main__")
    assert (tmp_path / "idea.png").stat().st_size > 10_000


# --- form ----------------------------------------------------------------------------------------------------------


def test_the_readme_is_a_first_screen():
    assert len(README.splitlines()) <= 150


def find_anchors(page):
    """GitHub's anchors of the headings of a page."""
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall("^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in find_anchors(file), target


def test_every_file_that_is_named_is_there():
    for page in PAGES:
        for name in re.findall(r"`([\w/.]+(?:\.py|\.yaml|\.md|/))`", page.read_text()):
            is_there = (ROOT / name).exists() or (YAMLS / name).exists() or any(PACKAGE.rglob(name))
            assert is_there or "NAME" in name or name in (RECIPE_FILE, "tensorboard/"), f"{page.name}: {name}"


def test_every_page_of_the_docs_is_linked_from_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name}" in README


def test_every_picture_is_used_once():
    text = "".join(page.read_text() for page in PAGES)
    pictures = [Path(target).name for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)]
    assert sorted(pictures) == sorted(path.name for path in ROOT.glob("docs/*.png"))


# --- what is said twice agrees -------------------------------------------------------------------------------------


def test_every_recipe_is_in_the_table_and_its_head_has_the_same_numbers():
    rows = table_rows(RECIPES, after="Recipes")
    named = [name for row in rows for name in re.findall("`(.*?)`", row[0])]
    assert sorted(named) == sorted(path.name for path in YAMLS.glob("*.yaml"))
    for cell, _, expected in rows:
        for name in re.findall("`(.*?)`", cell):
            header = read_header(name)
            assert set(NUMBER.findall(expected)) <= set(NUMBER.findall(header)), name
            assert ("the paper's:" in expected) == ("Expected:  the paper's:" in header), name


def test_the_readme_has_the_papers_numbers():
    (sentence,) = re.findall(r"In the paper, .*?accuracy\.", README, flags=re.DOTALL)
    assert NUMBER.findall(sentence) == ["17.0", "24.6", "83.5", "83.7"]
    assert set(NUMBER.findall(sentence)) <= set(NUMBER.findall(read_header("simmim_vitb_pss.yaml")))


def test_a_recipes_head_links_to_what_was_measured_here():
    for path in YAMLS.glob("*.yaml"):
        header = read_header(path.name)
        for place in re.findall(r"measured here with .*?: see .*?([\w/]+\.md)", header):
            assert path.name in (ROOT / place).read_text()
        if path.stem.startswith("digits"):
            assert "measured here with" in header and not re.search(r"\d %", header), path.name


def test_every_key_of_a_recipe_is_in_its_table():
    keys = {key for row in table_rows(RECIPES, after="Keys") for key in re.findall("`(.*?)`", row[0])}
    assert keys == {setting.name for setting in dataclasses.fields(Recipe)}


def test_the_loaders_ratios_are_those_of_the_benchmark():
    benchmark = {(row[0], row[1]): row[3] for row in table_rows((ROOT / "benchmarks/README.md").read_text(),
                                                               after="Loading pictures")}
    cells = re.findall(r"^\| shards.*? \| (\S+) × \| (?:(\S+) × )?\|", DATA, flags=re.MULTILINE)
    for (train, val), loader in zip(cells, ("shards", "shards 256", "shards, repeats=3"), strict=True):
        assert train == benchmark["train", loader] and (not val or val == benchmark["val", loader])


def test_the_schedules_have_the_means_that_the_table_says():
    for cell, written, *_ in table_rows(METHOD, after="How to choose a schedule"):
        schedule = eval(re.match("`(.*?)`", cell)[1], vars(schedules))
        rates = keep_rates(schedule, epochs=1, batches_per_epoch=5040)
        assert mean(rates) == pytest.approx(float(written), abs=6e-4)


def test_the_makefile_and_the_readme_agree_on_the_set_up():
    makefile = (ROOT / "Makefile").read_text()
    for words in ("2 to 5 minutes", "7 GB", "Python 3.10 to 3.12"):
        assert words in README.replace("\n", " ") and words in makefile
