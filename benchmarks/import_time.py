"""What `import-checkpoint` costs, on ViT-B files of random weights: `python -m benchmarks.import_time`.

Two files in SimMIM's layouts: pre-training with AdamW's state, and fine-tuning with weights alone. Each is imported by
the command line in a process of its own, with the file in the page cache. Memory is the most that the process ever has
resident, less that of a process which only imports the command's modules; pages that are mapped from a file count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from benchmarks.step_time import describe_machine, positive_int, print_table
from pss_composer.models.shape import ViTShape
from pss_composer.models.simmim import SimMIMClassifier
from pss_composer.pretraining.simmim import SimMIM, build_encoder

MAX_SECONDS = 10
MAX_MEMORY = 2  # times the file
TITLES = {"pretraining.pth": "pre-training, with optimizer", "finetuning.pth": "fine-tuning, weights alone"}


def build_files(folder: Path) -> None:
    """Write both files; in a process of its own, for Linux hands the peak of a process on to those that it starts."""
    model = SimMIM(build_encoder(ViTShape("base")))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = {"encoder.patch_embed.norm.mask_token": "encoder.mask_token", "decoder.weight": "decoder.0.weight",
             "decoder.bias": "decoder.0.bias"}
    weights = {names.get(name, name): weight for name, weight in model.state_dict().items()}
    weights["decoder.0.weight"] = weights["decoder.0.weight"][:, :, None, None]
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 799}, folder / "pretraining.pth")
    torch.save({"model": SimMIMClassifier(ViTShape("base")).vit.state_dict()}, folder / "finetuning.pth")


def measure(*arguments: str) -> tuple[float, float]:
    """Seconds and peak memory in MiB of a Python process.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__.split("\n\n")[1])
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of every process; the median counts")
    args = parser.parse_args()
    print(describe_machine(argparse.Namespace(threads=torch.get_num_threads(), device="cpu")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builder = get_context("spawn").Process(target=build_files, args=(folder,))
        builder.start()
        builder.join()
        runs = {"imports": [measure("-c", "import pss_composer.checkpoints.export") for _ in range(args.rounds)]}
        for file in TITLES:
            runs[file] = []
            for turn in range(args.rounds):
                out = folder / f"{turn}-{file}.safetensors"
                runs[file].append(measure("-m", "pss_composer", "import-checkpoint", str(folder / file), str(out)))
                out.unlink()
        sizes = {file: (folder / file).stat().st_size / 2**20 for file in TITLES}
    seconds, memory = ({case: median(values[i] for values in turns) for case, turns in runs.items()} for i in (0, 1))
    multiples = {file: (memory[file] - memory["imports"]) / sizes[file] for file in TITLES}
    rows = [["imports alone", "", f"{seconds['imports']:.1f}", f"{memory['imports']:.0f}", ""]]
    rows += [[title, f"{sizes[file]:.0f}", f"{seconds[file]:.1f}", f"{memory[file]:.0f}", f"{multiples[file]:.2f}"]
             for file, title in TITLES.items()]
    print(f"\nmedians of {args.rounds} rounds\n")
    print_table(["file", "MiB", "seconds", "peak MiB", "less imports, of the file"], rows)
    print(f"\nbar: under {MAX_SECONDS} s, and under {MAX_MEMORY} times the file in memory")
    for file, title in TITLES.items():
        is_met = seconds[file] < MAX_SECONDS and multiples[file] < MAX_MEMORY
        print(f"{'met    ' if is_met else 'NOT MET'}  {title}: {seconds[file]:.1f} s, {multiples[file]:.2f} times")


if __name__ == "__main__":
    main()
