"""What every test needs: one thread (the models are tiny, and two processes share two cores in some tests)."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
