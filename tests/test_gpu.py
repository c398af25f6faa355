"""What is to work on a GPU: gpu_checks.py, and the tests of the command line that are for GPUs."""

from pathlib import Path

import pytest
import torch
from own_process import run_pytest

FOLDER = Path(__file__).parent


def run_checks(*options: str) -> None:
    files = (str(FOLDER / name) for name in ("gpu_checks.py", "test_cli.py"))
    assert "skipped" not in run_pytest("-m", "gpu", *options, *files, PYTHONPATH=str(FOLDER))


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch computes on GPUs of its own")
def test_on_an_emulated_gpu():
    run_checks("-p", "emulated_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu():
    run_checks()
