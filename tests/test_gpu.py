"""What is to work on a GPU: gpu_checks.py, and the tests of the command line that are for GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
CHECKS = ["gpu_checks.py", "test_cli.py"]


def run_checks(*options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *options]
    command += [str(FOLDER / name) for name in CHECKS]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(FOLDER)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-2000:]
    assert "skipped" not in process.stdout


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch computes on GPUs of its own")
def test_on_an_emulated_gpu():
    run_checks("-p", "emulated_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu():
    run_checks()
