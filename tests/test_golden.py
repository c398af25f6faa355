"""The converted model gives the original's numbers. `python -m pytest tests/test_golden.py -v` shows each case."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformer_inputs import in_dtype, relative_error

from diffusers_localdit.conversion import load_original

GOLDEN = Path(__file__).parent / "golden"
FORWARD_CASES = [
    pytest.param(folder, case["file"], id=f"{folder.name}-{case['latent_height']}x{case['latent_width']}")
    for folder in sorted(path.parent for path in GOLDEN.glob("*/case.json"))
    for case in json.loads((folder / "case.json").read_text())["forward"]
]


def load_case(folder: Path, file: str):
    config = json.loads((folder / "case.json").read_text())["config"]
    with_processor = folder / "original_with_processor.pt"
    checkpoint = with_processor if with_processor.exists() else folder / "original_without_processor.pt"
    model = load_original(
        checkpoint,
        window_size=config["window_size"],
        sample_size=config["sample_size"],
        use_rope=config["use_rope"],
    )
    tensors = load_file(folder / file)
    expected = tensors.pop("sample")
    added = {name: tensors.pop(name) for name in ("resolution", "aspect_ratio")}
    return model, {**tensors, "added_cond_kwargs": added}, expected


@pytest.mark.parametrize("folder, file", FORWARD_CASES)
@pytest.mark.usefixtures("golden_frequencies")
@torch.no_grad()
def test_forward_meets_the_original(folder, file):
    model, inputs, expected = load_case(folder, file)
    assert relative_error(model(**inputs).sample, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("folder, file", FORWARD_CASES)
@torch.no_grad()
def test_half_precision_stays_near_float32(folder, file, dtype):
    model, inputs, expected = load_case(folder, file)
    half_inputs = in_dtype(dtype, inputs)
    half_inputs["added_cond_kwargs"] = inputs["added_cond_kwargs"]  # sizes in pixels stay exact
    assert relative_error(model.to(dtype)(**half_inputs).sample, expected) < 2e-2
