"""Two processes, by Composer's launcher."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def launch(*arguments: str, log: Path, timeout: float = 240.0) -> None:
    """Run a script on two processes; none of them outlives this call."""
    # the launcher takes a free port unless the environment names one
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE",
                                  "LOCAL_WORLD_SIZE")}
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = f"no end within {timeout} s"
        finally:
            # the session is the launcher's own, and its workers'
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert status == 0, f"{' '.join(command)}: {status}\n{log.read_text()[-8000:]}"
