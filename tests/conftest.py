"""What holds for all tests: one thread, so that several workers do not wait for each other's; and no deadline
for an example of Hypothesis, which a busy machine would miss."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
