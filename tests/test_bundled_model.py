"""The model that the package ships: complete, small, and drawing on what the prompt says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusers_localdit import BUNDLED_MODEL, LocalDiTImg2ImgPipeline, LocalDiTPipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))
from judge import find_objects, judge
from scenes import sample_caption
from train_vae import reconstructions_right


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
    for path in BUNDLED_MODEL.glob("*/config.json"):  # no folder of the machine where it was made
        assert "/" not in json.loads(path.read_text()).get("_name_or_path", ""), path


def test_decoded_latents_still_show_what_the_pictures_show(pipe):
    assert reconstructions_right(pipe.vae, pictures=64, seed=0) >= 63


def test_single_objects_are_drawn_as_asked(pipe):
    """Held-out captions; the whole evaluation is `examples/shapes/evaluate.py`, whose figures the README shows."""
    rng = np.random.default_rng(0)
    wanted = [sample_caption(rng, "single", held_out=True) for _ in range(16)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(wanted))]
    images = pipe([caption for _, caption in wanted], guidance_scale=1.5, generator=generators).images
    wrong = [judge(image, spec).reason for image, (spec, _) in zip(images, wanted) if not judge(image, spec).right]
    assert len(wrong) <= 3, wrong


def test_a_scribble_becomes_the_shape_of_the_prompt(pipe):
    scribble = Image.new("RGB", (128, 128), "white")
    points = [(64 + side * 22, 40 + 6 * row) for row, side in enumerate([-1, 1] * 4)]
    ImageDraw.Draw(scribble).line(points, fill="firebrick", width=7)
    image_to_image = LocalDiTImg2ImgPipeline.from_pipe(pipe)
    image_to_image.set_progress_bar_config(disable=True)
    for shape in ("circle", "square"):
        generator = torch.Generator().manual_seed(0)
        prompt = f"a red {shape} on a white background"
        image = image_to_image(prompt, image=scribble, strength=0.6, guidance_scale=1.5, generator=generator).images[0]
        (found,) = find_objects(np.asarray(image, dtype=np.float32))
        assert (found.colour, found.shape) == ("red", shape)
        assert abs(found.x - 64) < 24 and abs(found.y - 61) < 24  # about where the scribble is
