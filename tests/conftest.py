"""What holds for all tests: one thread, so that several workers do not wait for each other's."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
