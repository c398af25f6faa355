"""Python in a process of its own."""

import os
import subprocess
import sys


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def run_pytest(*arguments: str, **environment: str) -> str:
    """What it prints; all tests have to pass."""
    process = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-2000:]
    return process.stdout
