"""What is to work on a GPU: gpu_checks.py, and the tests of the command line that are for GPUs."""

from pathlib import Path

import pytest
import torch
from own_process import run_pytest

FOLDER = Path(__file__).parent


NO_CUDA = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch computes on GPUs of its own")


def run_checks(*options: str, **environment: str) -> None:
    files = (str(FOLDER / name) for name in ("gpu_checks.py", "test_cli.py"))
    assert "skipped" not in run_pytest("-m", "gpu", *options, *files, PYTHONPATH=str(FOLDER), **environment)


@NO_CUDA
def test_on_an_emulated_gpu():
    run_checks("-p", "emulated_gpu")


@NO_CUDA
@pytest.mark.slow
def test_kernels_on_an_emulated_gpu():
    """By Triton's interpreter: a picture, its transformer coming when it is needed."""
    pytest.importorskip("triton")
    run_checks("-p", "emulated_gpu", "-k", "default and model", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu():
    run_checks()
