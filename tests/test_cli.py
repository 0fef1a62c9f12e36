"""The parser: what it imports, what it calls, and what its errors name."""

import subprocess
import sys

import pytest
from support.paths import ROOT

from pss_composer import __version__
from pss_composer.cli import main
from pss_composer.errors import InputError, InputErrors

HEAVY = ("torch", "timm", "composer", "streaming", "omegaconf", "numpy", "matplotlib")
COMMANDS = ("train", "evaluate", "report", "reconstruct", "import-checkpoint", "export-checkpoint", "convert",
            "check-data", "clean-shared-memory")


def test_help_version_and_wrong_usage_import_nothing_heavy():
    usages = [["--help"], ["--version"], [], ["nonsense"], ["evaluate", "run", "--keep-rates", "x"],
              *([command, "--help"] for command in COMMANDS), *([command] for command in COMMANDS[:-1])]
    script = (
        "import contextlib, io, sys\n"
        "from pss_composer.__main__ import main\n"
        f"for usage in {usages!r}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n"
        "            main(usage)\n"
        "        except SystemExit as error:\n"
        "            is_right = bool(error.code) != ('--help' in usage or '--version' in usage)\n"
        "    assert is_right, usage\n"
        f"sys.exit(', '.join(name for name in {HEAVY!r} if name in sys.modules) or None)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_version_and_the_name_of_the_program(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0 and capsys.readouterr().out == f"pss {__version__}\n"
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith("pss evaluate: error: the following arguments are required: RUN\n")


@pytest.fixture
def calls(monkeypatch):
    """What the commands call: a function that replaces one of them by a record of its calls, or by an error."""

    def replace(path, error=None):
        calls = []

        def function(*args, **kwargs):
            calls.append((args, kwargs))
            if error is not None:
                raise error
            return 0

        monkeypatch.setattr(path, function)
        return calls

    return replace


@pytest.mark.parametrize(
    ("arguments", "function", "args"),
    [
        ("train digits seed=1 model.depth=2", "training.command.train_recipe", ("digits", ["seed=1", "model.depth=2"])),
        ("train digits", "training.command.train_recipe", ("digits", [])),
        ("evaluate a b", "evaluation.commands.evaluate_runs", (["a", "b"], (1.0, 0.8, 0.6, 0.4, 0.2))),
        ("evaluate a --keep-rates 1 0.5", "evaluation.commands.evaluate_runs", (["a"], [1.0, 0.5])),
        ("clean-shared-memory", "data.mds.shared_memory.clean_shared_memory", ()),
    ],
)
def test_commands_are_functions(arguments, function, args, calls):
    recorded = calls(f"pss_composer.{function}")
    main(arguments.split())
    assert recorded == [(args, {})]


@pytest.mark.parametrize(
    ("arguments", "function", "names"),
    [
        ("train digits", "training.command.train_recipe",
         {"data.path": "data.path", "seed": "seed", "run_name": "run_name", "": ""}),
        ("evaluate a", "evaluation.commands.evaluate_runs",
         {"run": "RUN", "keep_rates": "--keep-rates", "data.path": "data.path", "checkpoint": "checkpoint"}),
        ("report a --out b", "evaluation.commands.report_runs", {"run": "RUN", "out": "--out"}),
        ("reconstruct a --out b", "evaluation.commands.reconstruct_images", {"run": "RUN", "out": "--out"}),
        ("import-checkpoint a b", "checkpoints.export.export_weights",
         {"checkpoint": "FILE", "out": "OUT", "image_size": "--image-size", "ema": "--ema"}),
        ("export-checkpoint a b", "checkpoints.export.export_weights", {"checkpoint": "RUN", "out": "OUT"}),
        ("convert a b", "data.prepare.convert.convert_images",
         {"source": "SRC", "out": "OUT", "ground_truth": "--ground-truth", "shortest_side": "--shortest-side",
          "quality": "--quality", "shard_size": "--shard-size", "num_workers": "--workers", "is_strict": "--strict"}),
        ("check-data a", "data.prepare.check.check_data",
         {"path": "PATH", "samples_per_shard": "--samples-per-shard"}),
    ],
)
def test_errors_name_what_the_user_typed(arguments, function, names, calls):
    calls(f"pss_composer.{function}", InputErrors([InputError("must be good", key=key) for key in names]))
    with pytest.raises(SystemExit) as exit_info:
        main(arguments.split())
    assert exit_info.value.code.splitlines() == [f"error: {name} must be good".replace("  ", " ")
                                                 for name in names.values()]


@pytest.mark.parametrize("arguments", ["--debug check-data a", "check-data a --debug"])
def test_debug_shows_the_traceback(arguments, calls):
    calls("pss_composer.data.prepare.check.check_data", InputError("must be good", key="path"))
    with pytest.raises(InputError, match="^PATH must be good$"):
        main(arguments.split())


def test_debug_between_the_settings_of_a_recipe(calls):
    recorded = calls("pss_composer.training.command.train_recipe", InputError("must be good", key="seed"))
    with pytest.raises(InputError, match="^seed must be good$"):
        main(["train", "digits", "seed=1", "--debug", "model.depth=2"])
    assert recorded == [(("digits", ["seed=1", "model.depth=2"]), {})]


def test_check_data_has_an_exit_status(monkeypatch):
    monkeypatch.setattr("pss_composer.data.prepare.check.check_data", lambda path, samples_per_shard: samples_per_shard)
    main(["check-data", "a", "--samples-per-shard", "0"])
    with pytest.raises(SystemExit) as exit_info:
        main(["check-data", "a", "--samples-per-shard", "2"])
    assert exit_info.value.code == 1


def test_convert_on_ctrl_c(calls, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    calls("pss_composer.data.prepare.convert.convert_images", KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", "a", "b"])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "stopped: the same command goes on from here\n"


def test_ctrl_c_before_training_leaves_no_traceback(calls, capsys):
    calls("pss_composer.training.command.train_recipe", KeyboardInterrupt())  # while libraries are imported
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "digits"])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"
