"""Which room may import which, read from the imports themselves (the map is in CONTRIBUTING.md)."""

import ast
import subprocess
import sys

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "pss_composer"
BASE = {"errors", "checks", "locks", "seeds"}  # known to every room
METHOD = {"progress", "schedules", "sampler_checks", "sampling", "surgery", "callback", "algorithm"}
# room -> the rooms that it may import, beside itself and the base
MAY_IMPORT = {
    **{module: set() for module in BASE},
    **{module: METHOD for module in METHOD},
    "integrations": METHOD - {"algorithm"},
    "models": METHOD,
    "pretraining": METHOD | {"models"},
    "data": set(),
    "data.prepare": {"data"},
    "checkpoints": {"models.shape", "models.settings", "models.weight_names"},
    "training": METHOD | {"models", "pretraining", "data", "checkpoints"},
    "evaluation": METHOD | {"models", "pretraining", "data", "checkpoints", "training"},
    "cli": METHOD | {"models", "pretraining", "data", "data.prepare", "checkpoints", "training", "evaluation"},
    "__main__": {"cli"},
    "__init__": METHOD,
}
# what a name in an import statement may come from, and where: the heavy libraries that some rooms do without
ONLY_IN = {
    "composer": {"algorithm", "models", "pretraining", "data", "training", "evaluation"},
    "streaming": {"data.mds", "data.prepare", "data.sources.digits"},
    "lightning": {"integrations.lightning"},
    "pytorch_lightning": {"integrations.lightning"},
    "accelerate": set(),
    "transformers": {"integrations.transformers", "surgery", "models.transformers"},
    "open_clip": {"surgery"},
    "timm": {"surgery", "models", "pretraining", "data.augmentation", "checkpoints", "training"},
}
LIGHT = ["errors", "checks", "locks", "seeds", "progress", "schedules", "models.shape", "models.settings",
         "pretraining.settings", "data.settings", "data.augmentation.settings", "training.recipe", "training.rules",
         "training.reading", "training.command", "cli"]


def find_modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), path


MODULES = dict(find_modules())


def find_room(module):
    return max((room for room in MAY_IMPORT if f"{module}.".startswith(f"{room}.")), key=len)


def find_imports(path):
    """Every module that a file imports, at the top or in a function; those for type checkers alone are left out."""
    tree = ast.parse(path.read_text())
    for_types = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If)
                 and getattr(block.test, "id", "") == "TYPE_CHECKING" for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            is_package = node.module == "pss_composer" or node.module.removeprefix("pss_composer.") in MODULES
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_package and full.removeprefix("pss_composer.") in MODULES else node.module


def test_every_room_is_on_the_map():
    assert {find_room(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_it_may(module):
    room = find_room(module)
    allowed = MAY_IMPORT[room] | BASE | {room}
    for name in find_imports(MODULES[module]):
        library = name.split(".")[0]
        if library != "pss_composer":
            rooms = ONLY_IN.get(library)
            assert rooms is None or any(f"{module}.".startswith(f"{place}.") for place in rooms), f"{module}: {name}"
            continue
        target = name.removeprefix("pss_composer.")
        is_allowed = any(f"{target}.".startswith(f"{place}.") for place in allowed)
        # a room within another one is not meant by the other's name
        is_inner = target.startswith("data.prepare") and "data.prepare" not in allowed
        assert name == "pss_composer" or (is_allowed and not is_inner), f"{module} must not import {name}"


def test_there_are_no_circles():
    graph = {module: {name.removeprefix("pss_composer.") for name in find_imports(path)} & set(MODULES)
             for module, path in MODULES.items()}
    while free := [module for module, imports in graph.items() if not imports & set(graph) - {module}]:
        for module in free:
            del graph[module]
    assert not graph


def test_only_the_mds_room_touches_what_is_private_in_streaming():
    for module, path in MODULES.items():
        if not module.startswith("data.mds"):
            assert not [name for name in find_imports(path) if name.startswith("streaming.base.") and
                        module != "data.prepare.stores"], module


@pytest.mark.parametrize("module", MODULES)
def test_no_function_is_longer_than_a_screen(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


def test_no_adapter_is_longer_than_eighty_lines():
    adapters = [path for path in (PACKAGE / "surgery").rglob("*.py") if path.parent.name in ("timm", "transformers")
                or path.name in ("torchvision.py", "open_clip.py")]
    assert len(adapters) >= 10
    assert {path: count for path in adapters if (count := len(path.read_text().splitlines())) > 80} == {}


def imported_after(statement):
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


def test_the_method_needs_torch_and_timm_alone():
    statement = ("import pss_composer.schedules, pss_composer.sampling; from pss_composer import PatchSampler; "
                 "from pss_composer import apply_patch_sampling")
    loaded = imported_after(statement)
    assert "torch" in loaded
    assert not {"composer", "streaming", "omegaconf", "sklearn", "lightning", "transformers", "accelerate",
                "open_clip"} & loaded


def test_a_recipe_is_checked_before_the_slow_imports():
    statement = f"import {', '.join(f'pss_composer.{module}' for module in LIGHT)}; " \
                "pss_composer.training.reading.load_recipe('yamls/simmim_vitb_pss.yaml')"
    assert not {"torch", "timm", "composer", "streaming", "numpy"} & imported_after(statement)
