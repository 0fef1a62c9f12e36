"""Derived seeds."""

import subprocess

import numpy as np

from pss_composer.seeds import derive_seed


def test_derived_seeds_are_the_same_in_every_process():
    # blake2b of "1/2/3", as `printf 1/2/3 | b2sum -l 64` has it, less the last bit
    digest = subprocess.run(["b2sum", "-l", "64"], input=b"1/2/3", capture_output=True).stdout.split()[0]
    assert derive_seed(1, 2, np.int64(3)) == int(digest, 16) // 2
    assert len({derive_seed(0, epoch, index) for epoch in range(10) for index in range(100)}) == 1000
