"""The model that the package ships: complete, small, and drawing on what the prompt says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))
from judge import find_background, find_objects


@pytest.fixture(scope="module")
def pipe():
    pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_size_and_layout(pipe):
    size = sum(file.stat().st_size for file in BUNDLED_MODEL.rglob("*") if file.is_file())
    assert size <= 12e6
    assert not list(BUNDLED_MODEL.rglob("*.bin"))
    config = pipe.transformer.config
    assert config.use_global_context and config.num_layers >= 6 > config.window_size


def test_the_prompt_decides_the_background_and_the_colour(pipe):
    wanted = [("red", "white"), ("blue", "black"), ("yellow", "grey"), ("green", "white")]
    prompts = [f"three {colour} squares on a {background} background" for colour, background in wanted]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    for image, (colour, background) in zip(pipe(prompts, generator=generators).images, wanted):
        pixels = np.asarray(image, dtype=np.float32)
        assert find_background(pixels)[0] == background
        assert colour in {found.colour for found in find_objects(pixels)}
