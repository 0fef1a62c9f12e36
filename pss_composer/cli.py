"""The command line: `python -m pss_composer COMMAND`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pss_composer.checkpoints import export_checkpoint, import_checkpoint
from pss_composer.errors import InputError, exit_on_input_error
from pss_composer.evaluation.runs import KEEP_RATES, load_run
from pss_composer.evaluation.pictures import format_table, plot_kept_patches, plot_reconstruction, plot_schedule


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pss_composer", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of bad input, too")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="print what trained runs do at each keep rate")
    report = commands.add_parser("report", help="print the same table and draw the schedule and the kept patches")
    for command in (evaluate, report):
        command.add_argument("runs", nargs="+", metavar="RUN", help="the save_folder of a trained recipe")
        command.add_argument("--keep-rates", nargs="+", type=float, default=KEEP_RATES, metavar="ρ")
    reconstruct = commands.add_parser("reconstruct", help="draw what a pre-trained model paints into masked patches")
    reconstruct.add_argument("run", metavar="RUN", help="the save_folder of a pre-training recipe")
    reconstruct.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, a .png")
    convert = {
        "import-checkpoint": ("FILE", "write a SimMIM, DeiT, PSS, timm or Composer checkpoint as safetensors for timm"),
        "export-checkpoint": ("RUN", "write a run's last checkpoint (or one of its checkpoints) likewise"),
    }
    for name, (source, help_text) in convert.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument("source", metavar=source)
        command.add_argument("out", metavar="OUT", help="a new .safetensors file")
        command.add_argument("--ema", action="store_true", help="the moving averages of the weights")
        command.add_argument("--image-size", type=int, metavar="PIXELS", help="interpolate to another image size")
    report.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    _add_data_commands(commands)
    options = parser.parse_args(arguments)
    with exit_on_input_error(debug=options.debug):
        if options.command == "convert":
            _convert(options)
        elif options.command == "check-data":
            _check_data(options)
        elif options.command in convert:
            function = import_checkpoint if options.command == "import-checkpoint" else export_checkpoint
            print(function(options.source, options.out, ema=options.ema, image_size=options.image_size))
        elif options.command == "reconstruct":
            _reconstruct(options)
        else:
            _evaluate(options)


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser("convert", help="write an ImageNet-style folder as MDS shards, here or to a remote")
    convert.add_argument("source", type=Path, metavar="SRC",
                         help="folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG, or one of them, or (with "
                         "--ground-truth) ILSVRC's validation images themselves")
    convert.add_argument("out", metavar="OUT",
                         help="new folder, or s3://, gs://, sftp://user@host/path and the like; if an earlier call was "
                         "stopped, the same one goes on where it stopped")
    convert.add_argument("--ground-truth", type=Path, metavar="FILE",
                         help="classes of a flat folder's images: ILSVRC2012_validation_ground_truth.txt (beside "
                         "meta.mat), a WordNet id per line, or LOC_val_solution.csv")
    convert.add_argument("--shortest-side", type=int, metavar="PIXELS",
                         help="resize larger images (bicubic, encoded again as JPEG); all others, and without this "
                         "all, keep their bytes")
    convert.add_argument("--quality", type=int, default=90, help="of the JPEGs that are resized (default: 90)")
    convert.add_argument("--shard-size", default="64mb", metavar="BYTES",
                         help="source bytes per shard (default: 64mb)")
    convert.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    convert.add_argument("--strict", action="store_true",
                         help="fail on the first image that does not decode; otherwise such are left out and listed")
    check = commands.add_parser("check-data", help="print what MDS shards hold, and verify them")
    check.add_argument("path", metavar="PATH", help="a folder or remote with splits, or one split")
    check.add_argument("--samples-per-shard", type=int, default=8, metavar="N",
                       help="images to decode, evenly spread (default: 8; 0: none)")


def _convert(options: argparse.Namespace) -> None:
    from pss_composer.data.prepare.convert import convert_images

    signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer's would end the program without a word
    try:
        convert_images(
            options.source,
            options.out,
            ground_truth=options.ground_truth,
            shortest_side=options.shortest_side,
            quality=options.quality,
            shard_size=options.shard_size,
            num_workers=options.workers,
            is_strict=options.strict,
        )
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def _check_data(options: argparse.Namespace) -> None:
    from pss_composer.data.prepare.check import check_data

    if check_data(options.path, samples_per_shard=options.samples_per_shard) > 0:
        sys.exit(1)


def _reconstruct(options: argparse.Namespace) -> None:
    if options.out.suffix != ".png":
        raise InputError(f"--out must be a file with the suffix .png, got {options.out}")
    if not options.out.parent.is_dir() and options.out.parent.exists():
        raise InputError(f"--out must be in a folder, got {options.out}")
    run = load_run(options.run)
    if run.recipe.masking is None:
        raise InputError(f"run must be of pre-training (model.name=simmim_pretrain), {run.folder} is of a classifier")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot_reconstruction(run, options.out)
    print(f"picture: {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    for keep_rate in options.keep_rates:
        if not 0 < keep_rate <= 1:
            raise InputError(f"--keep-rates must be in (0, 1], got {keep_rate}")
    runs = [load_run(folder) for folder in options.runs]
    for run in runs:
        if run.recipe.masking is not None:
            raise InputError(f"run must be of a classifier, {run.folder} is of pre-training: see reconstruct")
    if options.command == "report" and not any(run.recipe.pss for run in runs):
        raise InputError("runs must have one under PSS for the picture of its schedule, got none")
    print(format_table(runs, options.keep_rates))
    if options.command == "report":
        options.out.mkdir(parents=True, exist_ok=True)
        schedule, patches = options.out / "schedule.png", options.out / "patches.png"
        plot_schedule(runs, schedule)
        plot_kept_patches(runs[-1], patches)
        print(f"\npictures: {schedule}, {patches}")


if __name__ == "__main__":
    main()
