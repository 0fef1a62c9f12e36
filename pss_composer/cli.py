"""The console command `pss`: one parser; what a command does is a function elsewhere, imported when it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pss_composer import __version__
from pss_composer.checks import name_keys
from pss_composer.errors import exit_on_input_error
from pss_composer.evaluation import KEEP_RATES

AddCommand = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit status 1 and a line per mistake on bad input, 130 on Ctrl-C.

    Args:
        arguments: What stands after the program's name; None: the process's own arguments.
    """
    parser = argparse.ArgumentParser(prog="pss", description="Patch Sampling Schedules for Vision Transformers")
    parser.add_argument("--debug", action="store_true", help="show the traceback of bad input, too; anywhere")
    parser.add_argument("--version", action="version", version=f"pss {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, function: Callable[[argparse.Namespace], None], purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(function=function)
        return command

    _add_run_commands(add_command)
    _add_checkpoint_commands(add_command)
    _add_data_commands(add_command)
    words = sys.argv[1:] if arguments is None else arguments
    # argparse knows no option between two of train's key=value
    options = parser.parse_args([word for word in words if word != "--debug"])
    # an error names an argument of a function, which has a name of its own on the command line, or a key of a recipe
    typed = {action.dest: action.option_strings[0] if action.option_strings else str(action.metavar)
             for action in commands.choices[options.command]._actions}
    try:
        with exit_on_input_error(debug="--debug" in words), name_keys(lambda key: typed.get(key, key)):
            options.function(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _add_run_commands(add_command: AddCommand) -> None:
    train = add_command("train", _train, "train a recipe")
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    evaluate = add_command("evaluate", _evaluate, "print what trained runs do at each keep rate")
    report = add_command("report", _report, "print the same table and draw the schedule and the kept patches")
    for command in (evaluate, report):
        command.add_argument("run", nargs="+", metavar="RUN", help="the save_folder of a trained recipe")
        command.add_argument("--keep-rates", nargs="+", type=float, default=KEEP_RATES, metavar="ρ",
                             help=f"(default: {' '.join(map(str, KEEP_RATES))})")
    report.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    reconstruct = add_command("reconstruct", _reconstruct, "draw what a pre-trained model paints into masked patches")
    reconstruct.add_argument("run", metavar="RUN", help="the save_folder of a pre-training recipe")
    reconstruct.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a .png")


def _add_checkpoint_commands(add_command: AddCommand) -> None:
    importing = add_command("import-checkpoint", _export_weights,
                            "write a SimMIM, DeiT, PSS, timm or Composer checkpoint as safetensors for timm")
    importing.add_argument("checkpoint", metavar="FILE", help="the checkpoint, a file or a folder of shards")
    exporting = add_command("export-checkpoint", _export_weights, "write a run's checkpoint as safetensors for timm")
    exporting.add_argument("checkpoint", metavar="RUN", help="the save_folder of a run, or one of its checkpoints")
    for command in (importing, exporting):
        command.add_argument("out", metavar="OUT", help="a new .safetensors file; with transformers, a folder")
        command.add_argument("--ema", action="store_true", help="the moving averages of the weights")
        command.add_argument("--image-size", type=int, metavar="PIXELS", help="interpolate to another image size")


def _add_data_commands(add_command: AddCommand) -> None:
    convert = add_command("convert", _convert, "write an ImageNet-style folder as MDS shards, here or to a remote")
    convert.add_argument("source", type=Path, metavar="SRC",
                         help="folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, or one of them, or (with "
                         "--ground-truth) ILSVRC's validation images themselves")
    convert.add_argument("out", metavar="OUT",
                         help="new folder, or s3://, gs:// and the like; if an earlier call was stopped, the same one "
                         "goes on where it stopped")
    convert.add_argument("--ground-truth", type=Path, metavar="FILE",
                         help="classes of a flat folder's images: ILSVRC2012_validation_ground_truth.txt (beside "
                         "meta.mat), a WordNet id per line, or LOC_val_solution.csv")
    convert.add_argument("--shortest-side", type=int, metavar="PIXELS",
                         help="resize larger images (bicubic, encoded again as JPEG); all others, and without this "
                         "all, keep their bytes")
    convert.add_argument("--quality", type=int, default=90, help="of the JPEGs that are resized (default: 90)")
    convert.add_argument("--shard-size", default="64mb", metavar="BYTES",
                         help="source bytes per shard (default: 64mb)")
    convert.add_argument("--workers", dest="num_workers", type=int, metavar="N",
                         help="processes (default: one per core)")
    convert.add_argument("--strict", dest="is_strict", action="store_true",
                         help="fail on the first image that does not decode; otherwise such are left out and listed")
    check = add_command("check-data", _check_data, "print what MDS shards hold, and verify them")
    check.add_argument("path", metavar="PATH", help="a folder or remote with splits, or one split")
    check.add_argument("--samples-per-shard", type=int, default=8, metavar="N",
                       help="images to decode, evenly spread (default: 8; 0: none)")
    add_command("clean-shared-memory", _clean_shared_memory, "remove the shared memory that killed runs have left")


def _train(options: argparse.Namespace) -> None:
    from pss_composer.training.command import train_recipe

    train_recipe(options.recipe, options.overrides)


def _evaluate(options: argparse.Namespace) -> None:
    from pss_composer.evaluation.commands import evaluate_runs

    evaluate_runs(options.run, options.keep_rates)


def _report(options: argparse.Namespace) -> None:
    from pss_composer.evaluation.commands import report_runs

    report_runs(options.run, options.keep_rates, options.out)


def _reconstruct(options: argparse.Namespace) -> None:
    from pss_composer.evaluation.commands import reconstruct_images

    reconstruct_images(options.run, options.out)


def _export_weights(options: argparse.Namespace) -> None:
    from pss_composer.checkpoints.export import export_weights

    print(export_weights(options.checkpoint, options.out, ema=options.ema, image_size=options.image_size))


def _convert(options: argparse.Namespace) -> None:
    try:
        from pss_composer.data.prepare.convert import convert_images

        signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's would end the program without a word
        convert_images(
            options.source,
            options.out,
            ground_truth=options.ground_truth,
            shortest_side=options.shortest_side,
            quality=options.quality,
            shard_size=options.shard_size,
            num_workers=options.num_workers,
            is_strict=options.is_strict,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _check_data(options: argparse.Namespace) -> None:
    from pss_composer.data.prepare.check import check_data

    if check_data(options.path, samples_per_shard=options.samples_per_shard) > 0:
        sys.exit(1)


def _clean_shared_memory(options: argparse.Namespace) -> None:
    from pss_composer.data.mds.shared_memory import clean_shared_memory

    clean_shared_memory()
