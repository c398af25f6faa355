"""How much memory a pass takes on a GPU, by what `benchmarks/counted_memory.py` counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_large_picture_takes_less_memory_than_with_pixart():
    pytest.importorskip("triton")
    # A device without numbers also shows that no step has to wait for any.
    command = [sys.executable, ROOT / "benchmarks" / "counted_memory.py", "--sizes", "2048", "--batches", "1", "2"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = {(row["model"], row["batch_size"]): row for row in json.loads(output.splitlines()[-1])["rows"]}
    # Of the width of the network: 8 for the feed-forward before and after its GELU, and what goes in and past it.
    assert 11 < rows["pixart", 1]["peak_bytes"] / (128 * 128 * 1152 * 2) < 13
    for batch_size in (1, 2):
        assert rows["triton-global", batch_size]["share"] <= 0.6
        assert rows["triton-folded", batch_size]["share"] <= 0.55
        assert rows["localdit-global", batch_size]["share"] <= 0.85
