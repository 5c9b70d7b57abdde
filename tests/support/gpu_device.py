"""The device of tests/gpu: CUDA; with MINIPLM_GPU_TESTS_DEVICE=cpu the CPU, so that a machine without a GPU tries them.

On the CPU a test of CUDA's own behaviour (its memory, its synchronisation) still skips itself: `needs_cuda`.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else os.environ.get("MINIPLM_GPU_TESTS_DEVICE", "")
ON_GPU = DEVICE == "cuda"

needs_device = pytest.mark.skipif(not DEVICE, reason="no CUDA device (MINIPLM_GPU_TESTS_DEVICE=cpu runs on the CPU)")
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
