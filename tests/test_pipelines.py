"""Both pipelines, with tiny components: numbers of the original, what diffusers' users rely on, and every refusal."""

import ast
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_fixtures import make_components
from safetensors.torch import load_file
from tqdm import tqdm

from diffusers_localdit import BUNDLED_MODEL, pipeline_localdit, pipeline_localdit_img2img
from diffusers_localdit.conversion import load_original
from diffusers_localdit.pipeline_folder import RELEASED_SCHEDULER
from diffusers_localdit.pipeline_localdit import ASPECT_RATIO_BINS, LocalDiTPipeline
from diffusers_localdit.pipeline_localdit_img2img import LocalDiTImg2ImgPipeline
from diffusers_localdit.transformer_localdit import LocalDiTTransformer2DModel

GOLDEN = Path(__file__).parent / "golden" / "window4_global"
PROMPT = "a small red circle on a white background"
LONG_PROMPT = "a large blue square left of a Circle on a grey background"
STEPS = 3


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, prompt=PROMPT, seeds=(0,), **kwargs):
    """Final latents under fixed seeds, by default of few steps and for image to image from `PICTURE`."""
    if isinstance(pipe, LocalDiTImg2ImgPipeline) and "image" not in kwargs and "latents" not in kwargs:
        kwargs["image"] = PICTURE
    kwargs = {"num_inference_steps": STEPS, "generator": seeded(*seeds), "output_type": "latent"} | kwargs
    return pipe(prompt, **kwargs).images


def make_picture(height=128, width=128):
    row, column = np.mgrid[:height, :width]
    colours = np.stack([row * 255 // height, column * 255 // width, (row + column) % 256], axis=-1)
    return PIL.Image.fromarray(colours.astype(np.uint8))


PICTURE = make_picture()


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    return make_components(tmp_path_factory.mktemp("components"))


@pytest.fixture
def text_to_image(components):
    return quiet(LocalDiTPipeline(**components))


@pytest.fixture
def image_to_image(components):
    return quiet(LocalDiTImg2ImgPipeline(**components))


@pytest.fixture(params=[LocalDiTPipeline, LocalDiTImg2ImgPipeline])
def pipe(request, components):
    return quiet(request.param(**components))


@pytest.fixture
def transformer_calls(components):
    """Keyword arguments of each call of the transformer, and its positional input as `sample`."""
    calls = []

    def record(module, args, kwargs):
        calls.append({"sample": args[0], **kwargs})

    handle = components["transformer"].register_forward_pre_hook(record, with_kwargs=True)
    yield calls
    handle.remove()


@pytest.fixture
def copy_of(tmp_path):
    """A pipeline of the same weights that a test may change."""

    def copy(pipe, **kwargs):
        pipe.save_pretrained(tmp_path / "copy")
        return quiet(type(pipe).from_pretrained(tmp_path / "copy", **kwargs))

    return copy


class TestGolden:
    """The final latents of the original, through the public call."""

    @pytest.fixture(scope="class")
    def transformer(self):
        return load_original(GOLDEN / "original_with_processor.pt", sample_size=128)

    def case(self, index):
        settings = json.loads((GOLDEN / "case.json").read_text())["sampling"][index]
        tensors = load_file(GOLDEN / settings["file"])
        embeddings = {name: tensors[name] for name in tensors if "prompt" in name}
        arguments = {
            "num_inference_steps": settings["num_inference_steps"],
            "guidance_scale": settings["guidance_scale"],
            "output_type": "latent",
            **embeddings,
        }
        return settings, tensors, arguments

    @pytest.mark.parametrize("sizes", [True, False])
    def test_text_to_image(self, text_to_image, transformer, sizes):
        settings, tensors, arguments = self.case(0)
        scheduler = DPMSolverMultistepScheduler(**settings["scheduler"])
        pipe = quiet(LocalDiTPipeline.from_pipe(text_to_image, transformer=transformer, scheduler=scheduler))
        if sizes:
            arguments |= {"height": settings["height"], "width": settings["width"]}
        latents = pipe(latents=tensors["noise"], **arguments).images
        assert relative_error(latents, tensors["latents"]) < 1e-4

    @pytest.mark.parametrize("start", ["latents", "image"])
    def test_image_to_image(self, image_to_image, transformer, start, monkeypatch):
        settings, tensors, arguments = self.case(1)
        scheduler = DPMSolverMultistepScheduler(**settings["scheduler"])
        pipe = quiet(LocalDiTImg2ImgPipeline.from_pipe(image_to_image, transformer=transformer, scheduler=scheduler))
        steps, strength = settings["num_inference_steps"], settings["strength"]
        if start == "latents":
            scheduler.set_timesteps(steps)
            first = scheduler.timesteps[steps - int(steps * strength)]
            arguments["latents"] = scheduler.add_noise(tensors["init_latents"], tensors["noise"], first[None])
        else:
            arguments["image"] = tensors["init_latents"]
            monkeypatch.setattr(pipeline_localdit_img2img, "randn_tensor", lambda *args: tensors["noise"])
        latents = pipe(strength=strength, **arguments).images
        assert relative_error(latents, tensors["latents"]) < 1e-4


LEADING = {"timestep_spacing": "leading"}  # whole numbers, at which the noise level is not a matter of interpolation
SCHEDULERS = [
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverSinglestepScheduler, {}),
    (DDIMScheduler, {"clip_sample": False}),
    (EulerDiscreteScheduler, LEADING),
    (EulerAncestralDiscreteScheduler, LEADING),
    (HeunDiscreteScheduler, LEADING),
    (KDPM2DiscreteScheduler, LEADING),
    (UniPCMultistepScheduler, {}),
]


class TestSchedulers:
    @pytest.fixture
    def clean(self, components, monkeypatch):
        """Latents; the transformer is made to predict exactly the noise that lies on them."""
        clean = torch.randn(1, 4, 16, 16, generator=seeded(7))
        alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        log_sigmas = ((1 - alphas) / alphas).log().numpy() / 2

        def forward(sample, timestep, **kwargs):
            sigma = float(np.exp(np.interp(float(timestep[0]), np.arange(1000), log_sigmas)))
            return ((sample * (sigma**2 + 1) ** 0.5 - clean) / sigma,)

        monkeypatch.setattr(components["transformer"], "forward", forward)
        return clean

    @pytest.mark.parametrize(("scheduler_class", "config"), SCHEDULERS)
    def test_exact_prediction_ends_at_clean_latents(self, pipe, clean, scheduler_class, config):
        pipe.scheduler = scheduler_class(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **config)
        start = {"image": clean, "strength": 0.5} if isinstance(pipe, LocalDiTImg2ImgPipeline) else {}
        latents = latents_of(pipe, num_inference_steps=6, guidance_scale=1.0, **start)
        assert relative_error(latents, clean) < 1e-4

    @pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
    @pytest.mark.parametrize("model", ["released", "bundled"])
    def test_schedulers_take_over_what_latents_need(self, pipe, clean, scheduler_class, model):
        if model == "bundled":
            scheduler = DPMSolverMultistepScheduler.from_pretrained(BUNDLED_MODEL, subfolder="scheduler")
        else:
            scheduler = DPMSolverMultistepScheduler.from_config(RELEASED_SCHEDULER)
        assert PNDMScheduler.from_config(scheduler.config).config.skip_prk_steps  # image to image starts halfway
        pipe.scheduler = scheduler_class.from_config(scheduler.config)
        start = {"image": clean, "strength": 0.5} if isinstance(pipe, LocalDiTImg2ImgPipeline) else {}
        latents = latents_of(pipe, num_inference_steps=6, guidance_scale=1.0, **start)
        assert relative_error(latents, clean) < 1e-4

    def test_euler_starts_at_its_own_noise_level(self, text_to_image, transformer_calls):
        text_to_image.scheduler = EulerDiscreteScheduler()
        noise = torch.randn(1, 4, 16, 16, generator=seeded(1))
        latents_of(text_to_image, latents=noise, guidance_scale=1.0)
        sigma = text_to_image.scheduler.sigmas[0]
        assert sigma > 1
        expected = noise * text_to_image.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
        torch.testing.assert_close(transformer_calls[0]["sample"], expected)

    def test_eta_reaches_ddim_and_is_left_out_elsewhere(self, text_to_image):
        dpm = [latents_of(text_to_image, eta=eta) for eta in (0.0, 1.0)]
        assert torch.equal(*dpm)
        text_to_image.scheduler = DDIMScheduler()
        ddim = [latents_of(text_to_image, eta=eta) for eta in (0.0, 1.0, 1.0)]
        assert not torch.allclose(ddim[0], ddim[1])
        assert torch.equal(ddim[1], ddim[2])

    @pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
    def test_custom_timesteps(self, pipe, transformer_calls, guidance_scale):
        latents_of(pipe, timesteps=[900, 500, 200, 50], guidance_scale=guidance_scale, **half(pipe))
        expected = [200, 50] if isinstance(pipe, LocalDiTImg2ImgPipeline) else [900, 500, 200, 50]
        assert [call["timestep"][0].item() for call in transformer_calls] == expected
        assert pipe.num_timesteps == len(expected)

    def test_custom_sigmas(self, pipe):
        pipe.scheduler = EulerDiscreteScheduler()
        sigmas = [10.0, 5.0, 1.0, 0.1, 0.0]  # from four to the next
        latents_of(pipe, sigmas=sigmas, **half(pipe))
        assert pipe.num_timesteps == (2 if isinstance(pipe, LocalDiTImg2ImgPipeline) else 4)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx(sigmas)

    def test_custom_timesteps_of_second_order(self, image_to_image, transformer_calls):
        image_to_image.scheduler = HeunDiscreteScheduler()
        latents_of(image_to_image, timesteps=[900, 500, 200, 50], strength=0.5)
        assert [call["timestep"][0].item() for call in transformer_calls] == [200, 50, 50]

    @pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
    def test_progress_is_counted_in_steps(self, pipe, scheduler_class, monkeypatch):
        """Of which the second-order one takes two passes each, but for the last."""
        pipe.scheduler = scheduler_class()
        bar, shown = tqdm(file=io.StringIO()), []

        def progress_bar(total):
            bar.total = total
            return bar

        def callback(pipe, step, timestep, tensors):
            shown.append(bar.n)
            return tensors

        monkeypatch.setattr(pipe, "progress_bar", progress_bar)
        latents_of(pipe, num_inference_steps=4, callback_on_step_end=callback, **half(pipe))
        steps = 2 if isinstance(pipe, LocalDiTImg2ImgPipeline) else 4
        assert bar.n == bar.total == steps
        if scheduler_class is HeunDiscreteScheduler:
            assert shown == [n // 2 for n in range(2 * steps - 1)]
        else:
            assert shown == list(range(steps))

    def test_timesteps_and_sigmas_exclude_each_other(self, pipe):
        with pytest.raises(ValueError, match=r"timesteps.*sigmas"):
            latents_of(pipe, timesteps=[900, 10], sigmas=[10.0, 1.0])


def half(pipe):
    return {"strength": 0.5} if isinstance(pipe, LocalDiTImg2ImgPipeline) else {}


class TestGuidance:
    @pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
    def test_off_costs_one_forward_of_the_batch(self, pipe, transformer_calls, guidance_scale):
        latents_of(pipe, [PROMPT] * 3, seeds=(0, 1, 2), guidance_scale=guidance_scale)
        assert len(transformer_calls) == pipe.num_timesteps
        assert all(len(call["sample"]) == len(call["encoder_hidden_states"]) == 3 for call in transformer_calls)

    def test_on_is_one_forward_with_the_negative_half_first(self, pipe, transformer_calls):
        positive, _, negative, _ = pipe.encode_prompt([PROMPT] * 3, negative_prompt="black")
        latents_of(pipe, [PROMPT] * 3, seeds=(0, 1, 2), negative_prompt="black")
        assert len(transformer_calls) == pipe.num_timesteps
        for call in transformer_calls:
            torch.testing.assert_close(call["encoder_hidden_states"], torch.cat([negative, positive]))
            assert torch.equal(*call["sample"].chunk(2))

    def test_negative_prompt_steers_and_defaults_to_the_empty_text(self, pipe):
        default, empty, red = (latents_of(pipe, negative_prompt=text) for text in (None, "", "red"))
        assert torch.equal(default, empty)
        assert not torch.allclose(default, red)

    def test_negative_prompt_per_prompt(self, pipe):
        together = latents_of(pipe, [PROMPT] * 2, seeds=(0, 0), negative_prompt=["red", "blue"])
        for index, text in enumerate(("red", "blue")):
            alone = latents_of(pipe, negative_prompt=text)
            assert relative_error(together[index : index + 1], alone) < 1e-5

    def test_size_conditions_are_those_of_the_sample(self, pipe, transformer_calls):
        latents_of(pipe, height=64, width=96)
        for call in transformer_calls:
            assert call["sample"].shape == (2, 4, 8, 12)
            conditions = call["added_cond_kwargs"]
            assert conditions["resolution"].tolist() == [[64, 96]]
            assert conditions["aspect_ratio"].tolist() == [[1.5]]


class TestPrompts:
    def test_text_is_passed_raw(self, text_to_image):
        texts = ["  A Red CIRCLE!!  &amp; <b>blue</b>", "circle\n"]
        embeds, mask, *negative = text_to_image.encode_prompt(texts, do_classifier_free_guidance=False)
        assert negative == [None, None]
        inputs = text_to_image.tokenizer(texts, padding="max_length", max_length=120, return_tensors="pt")
        assert inputs.input_ids.shape == (2, 120)
        assert torch.equal(mask, inputs.attention_mask)
        expected = text_to_image.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
        assert torch.equal(embeds, expected)

    def test_padding_takes_no_part(self, pipe):
        """Neither in the encoder nor in cross-attention, since there can be any amount of it."""
        long, short = (latents_of(pipe, max_sequence_length=length) for length in (120, 40))
        assert relative_error(short, long) < 1e-5

    def test_truncation_names_what_is_lost(self, pipe, caplog):
        tokens = pipe.tokenizer(LONG_PROMPT).input_ids
        length = len(pipe.tokenizer("a large blue square left of").input_ids)
        kept, lost = (pipe.tokenizer.decode(part) for part in (tokens[: length - 1], tokens[length - 1 : -1]))
        assert kept + " " + lost == LONG_PROMPT
        embeds, *_ = pipe.encode_prompt(["circle", LONG_PROMPT], max_sequence_length=length)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert f"{lost!r} of {LONG_PROMPT!r}" in caplog.text
        expected, *_ = pipe.encode_prompt(kept, max_sequence_length=length)
        torch.testing.assert_close(embeds[1:], expected)

    def test_no_warning_at_exact_length(self, pipe, caplog):
        length = len(pipe.tokenizer(LONG_PROMPT).input_ids)
        pipe.encode_prompt(LONG_PROMPT, max_sequence_length=length)
        assert not caplog.records

    def test_embeddings_repeat_next_to_each_other(self, pipe):
        outputs = pipe.encode_prompt(["red", "blue"], negative_prompt=["cube", ""], num_images_per_prompt=2)
        for repeated, single in zip(outputs, pipe.encode_prompt(["red", "blue"], negative_prompt=["cube", ""])):
            assert torch.equal(repeated, single[[0, 0, 1, 1]])

    def test_contract_of_encode_prompt(self, pipe):
        """diffusers reads the names of what is returned from the source, and passes them to the call."""
        tree = ast.parse(textwrap.dedent(inspect.getsource(pipe.encode_prompt))).body[0]
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
        returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
        assert functions == [tree] and returns == [tree.body[-1]]
        names = [element.id for element in returns[0].value.elts]
        assert set(names) < set(inspect.signature(pipe).parameters)
        with torch.no_grad():
            encoded = dict(zip(names, pipe.encode_prompt(PROMPT, negative_prompt="black")))
        assert torch.equal(latents_of(pipe, None, **encoded), latents_of(pipe, negative_prompt="black"))

    def test_encoding_and_sampling_in_two_pipelines(self, pipe, components, tmp_path):
        """How a T5 of 9 GB is used where there is no room for it beside the transformer."""
        pipe.save_pretrained(tmp_path)
        encoder = type(pipe).from_pretrained(tmp_path, transformer=None, vae=None)
        names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
        with torch.no_grad():
            encoded = dict(zip(names, encoder.encode_prompt(PROMPT)))
        sampler = quiet(type(pipe).from_pretrained(tmp_path, text_encoder=None, tokenizer=None))
        assert torch.equal(latents_of(sampler, None, **encoded), latents_of(pipe))
        for guidance_scale in (7.0, 1.0):  # also where there is nothing else to encode
            with pytest.raises(ValueError, match="no text encoder"):
                latents_of(sampler, guidance_scale=guidance_scale)
        with pytest.raises(ValueError, match=r"guidance_scale=1\.0"):
            latents_of(sampler, None, **{name: encoded[name] for name in names[:2]})


class TestRepeatability:
    def test_alone_in_a_batch_and_in_another_batch(self, pipe):
        prompts, seeds = [PROMPT, LONG_PROMPT, "blue triangle"], (3, 1, 4)
        together = latents_of(pipe, prompts, seeds=seeds)
        turned = latents_of(pipe, prompts[::-1], seeds=seeds[::-1]).flip(0)
        assert relative_error(turned, together) < 1e-5
        for index, (prompt, seed) in enumerate(zip(prompts, seeds)):
            alone = latents_of(pipe, prompt, seeds=(seed,))
            assert relative_error(together[index : index + 1], alone) < 1e-5

    def test_images_per_prompt(self, pipe):
        together = latents_of(pipe, [PROMPT, LONG_PROMPT], seeds=(0, 1, 2, 3), num_images_per_prompt=2)
        for index, prompt in enumerate((PROMPT, PROMPT, LONG_PROMPT, LONG_PROMPT)):
            alone = latents_of(pipe, prompt, seeds=(index,))
            assert relative_error(together[index : index + 1], alone) < 1e-5

    def test_pictures_too(self, pipe):
        first, second = (latents_of(pipe, output_type="pil")[0] for _ in range(2))
        assert first.tobytes() == second.tobytes()

    def test_calls_leave_nothing_behind(self, text_to_image):
        """Also not image to image, which shares the scheduler and starts it in the middle."""
        before = latents_of(text_to_image)
        latents_of(quiet(LocalDiTImg2ImgPipeline.from_pipe(text_to_image)), strength=0.5)
        assert torch.equal(latents_of(text_to_image), before)

    def test_second_process_and_remote_code(self, text_to_image, image_to_image, tmp_path):
        """Saved pipelines give the same bits in another process, also when run by a copy of their file alone."""
        PICTURE.save(tmp_path / "picture.png")
        for pipe in (text_to_image, image_to_image):
            pipe.save_pretrained(tmp_path / type(pipe).__name__)
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(
            [sys.executable, "-c", SECOND_PROCESS, tmp_path, PROMPT, str(STEPS)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        for pipe in (text_to_image, image_to_image):
            expected = latents_of(pipe)
            for name in ("installed", "remote"):
                latents = load_file(tmp_path / f"{type(pipe).__name__}_{name}.safetensors")["latents"]
                assert torch.equal(latents, expected), name


SECOND_PROCESS = """
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from diffusers_localdit import pipeline_localdit, pipeline_localdit_img2img

folder, prompt, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for name, module, inputs in (
    ("LocalDiTPipeline", pipeline_localdit, {}),
    ("LocalDiTImg2ImgPipeline", pipeline_localdit_img2img, {"image": Image.open(folder / "picture.png")}),
):
    remote = {"custom_pipeline": module.__file__, "trust_remote_code": True}
    for origin, options in (("installed", {}), ("remote", remote)):
        pipe = DiffusionPipeline.from_pretrained(folder / name, **options)
        assert type(pipe).__name__ == name
        assert type(pipe).__module__.startswith("diffusers_localdit" if origin == "installed" else "diffusers_modules")
        generator = torch.Generator().manual_seed(0)
        latents = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **inputs).images
        save_file({"latents": latents}, folder / f"{name}_{origin}.safetensors")
"""


class TestImages:
    """What image to image starts from."""

    def test_forms_of_one_picture(self, image_to_image):
        array = np.asarray(PICTURE).astype(np.float32) / 255
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        expected = latents_of(image_to_image, image=PICTURE)
        for image in (array, tensor, array[None], tensor[None], [PICTURE], [array], [tensor]):
            assert relative_error(latents_of(image_to_image, image=image), expected) < 1e-5

    def test_latents_are_scaled_and_taken_as_they_are(self, image_to_image):
        vae = image_to_image.vae
        tensor = torch.from_numpy(np.asarray(PICTURE).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            encoded = vae.encode(tensor).latent_dist.mean * vae.config.scaling_factor
        expected = latents_of(image_to_image, image=PICTURE)
        for image in (encoded, encoded[0], [encoded[0]]):
            assert relative_error(latents_of(image_to_image, image=image), expected) < 1e-5

    def test_output_latents_are_input_latents(self, text_to_image, image_to_image, transformer_calls):
        latents = latents_of(text_to_image)
        transformer_calls.clear()
        latents_of(image_to_image, image=latents, strength=0.4, guidance_scale=1.0)
        scheduler = DPMSolverMultistepScheduler.from_config(image_to_image.scheduler.config)
        scheduler.set_timesteps(STEPS)
        noise = torch.randn(latents.shape, generator=seeded(0))
        expected = scheduler.add_noise(latents, noise, scheduler.timesteps[-1:])
        torch.testing.assert_close(transformer_calls[0]["sample"], expected)

    def test_latents_argument_is_the_noised_start(self, image_to_image, transformer_calls):
        start = torch.randn(1, 4, 8, 12, generator=seeded(5))
        latents_of(image_to_image, latents=start, strength=0.4, guidance_scale=1.0)
        assert torch.equal(transformer_calls[0]["sample"], start)

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
    def test_other_modes_and_sizes(self, image_to_image, mode):
        picture = make_picture(90, 200).convert(mode)
        expected = picture.convert("RGB").resize((64, 96), PIL.Image.Resampling.LANCZOS)
        sizes = {"height": 96, "width": 64}
        assert torch.equal(
            latents_of(image_to_image, image=picture, **sizes), latents_of(image_to_image, image=expected)
        )

    def test_size_is_that_of_the_picture(self, image_to_image):
        for image, height, width in (
            (make_picture(70, 130), 64, 128),
            (np.zeros((100, 33, 3), np.float32), 96, 32),
            (torch.zeros(3, 5, 31), 16, 16),
            (torch.zeros(1, 4, 6, 10), 48, 80),
        ):
            assert latents_of(image_to_image, image=image).shape == (1, 4, height // 8, width // 8)

    def test_one_picture_per_prompt(self, image_to_image):
        pictures = [PICTURE, PICTURE.rotate(90)]
        together = latents_of(
            image_to_image, [PROMPT] * 2, seeds=(0, 1, 2, 3), image=pictures, num_images_per_prompt=2
        )
        for index, picture in enumerate((*pictures[:1] * 2, *pictures[1:] * 2)):
            alone = latents_of(image_to_image, image=picture, seeds=(index,))
            assert relative_error(together[index : index + 1], alone) < 1e-5

    @pytest.mark.parametrize(("steps", "strength"), [(10, 0.6), (7, 0.5), (3, 1.0), (100, 0.01), (8, 0.249)])
    def test_strength_keeps_the_last_steps(self, image_to_image, transformer_calls, steps, strength):
        latents_of(image_to_image, num_inference_steps=steps, strength=strength, guidance_scale=1.0)
        kept = int(steps * strength)
        scheduler = image_to_image.scheduler
        assert [call["timestep"].item() for call in transformer_calls] == scheduler.timesteps[-kept:].tolist()
        assert image_to_image.num_timesteps == kept

    def test_starts_at_the_first_of_equal_timesteps(self, image_to_image):
        """Which only the index of the step can tell, not the timestep."""
        steps = 150
        scheduler = image_to_image.scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        start = max(
            index for index in range(1, steps) if timesteps[index - 1] > timesteps[index] == timesteps[index + 1]
        )
        latents_of(image_to_image, num_inference_steps=steps, strength=(steps - start) / steps + 1e-4)
        assert image_to_image.num_timesteps == steps - start
        assert scheduler.step_index == steps

    @given(steps=st.integers(1, 1000))
    def test_smallest_strength_in_the_message_is_valid(self, components, steps):
        pipe = LocalDiTImg2ImgPipeline(**components)
        pipe.scheduler.set_timesteps(steps)
        timesteps = pipe.scheduler.timesteps
        with pytest.raises(ValueError, match="`strength`") as error:
            pipe.get_timesteps(timesteps, steps, -0.5)
        smallest = float(re.search(r"nearest valid value is ([\d.]+)\.$", str(error.value)).group(1))
        assert len(pipe.get_timesteps(timesteps, steps, smallest)) >= 1
        with pytest.raises(ValueError, match=r"nearest valid value is 1\.0"):
            pipe.get_timesteps(timesteps, steps, 1.5)


class TestOutput:
    def test_types(self, pipe):
        latents, pt, array, pil = (latents_of(pipe, output_type=kind) for kind in ("latent", "pt", "np", "pil"))
        with torch.no_grad():
            decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        torch.testing.assert_close(pt, (decoded / 2 + 0.5).clamp(0, 1))
        assert latents.dtype == torch.float32
        assert array.shape == (1, 128, 128, 3)
        np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
        assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))

    def test_tuple(self, pipe):
        (images,) = pipe(PROMPT, num_inference_steps=2, return_dict=False, **with_image(pipe))
        assert isinstance(images[0], PIL.Image.Image)

    @pytest.mark.parametrize("sizes", [{}, {"height": 64}, {"width": 96}, {"height": 64, "width": 96}])
    def test_size(self, text_to_image, sizes):
        picture = latents_of(text_to_image, output_type="pil", **sizes)[0]
        assert picture.size == (sizes.get("width", 128), sizes.get("height", 128))

    def test_slicing_and_tiling(self, pipe, monkeypatch):
        plain = latents_of(pipe, [PROMPT] * 2, seeds=(0, 1), output_type="pt")
        batches = []
        handle = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape))
        pipe.vae.enable_slicing()
        sliced = latents_of(pipe, [PROMPT] * 2, seeds=(0, 1), output_type="pt")
        pipe.vae.disable_slicing()
        assert [len(shape) and shape[0] for shape in batches] == [1, 1]
        torch.testing.assert_close(sliced, plain)
        batches.clear()
        pipe.vae.enable_tiling()
        latents_of(pipe, output_type="pt", height=256, width=256)
        pipe.vae.disable_tiling()
        handle.remove()
        assert len(batches) > 1 and all(max(shape[-2:]) < 32 for shape in batches)

    @pytest.mark.parametrize(
        ("dtype", "force_upcast", "expected"),
        [
            (torch.float16, True, torch.float32),
            (torch.float16, False, torch.float16),
            (torch.bfloat16, True, torch.bfloat16),
        ],
    )
    def test_dtype_of_the_vae(self, pipe, copy_of, dtype, force_upcast, expected):
        pipe = copy_of(pipe)
        reference = latents_of(pipe, output_type="pt")
        pipe.vae.register_to_config(force_upcast=force_upcast)
        pipe.vae.to(dtype)
        used = []
        for coder in (pipe.vae.encoder, pipe.vae.decoder):
            coder.register_forward_pre_hook(lambda module, args: used.append(args[0].dtype))
        images = latents_of(pipe, output_type="pt")
        assert set(used) == {expected} and len(used) == 1 + isinstance(pipe, LocalDiTImg2ImgPipeline)
        assert pipe.vae.dtype == dtype
        assert (images.float() - reference).abs().mean() < 0.02


def with_image(pipe):
    return {"image": PICTURE} if isinstance(pipe, LocalDiTImg2ImgPipeline) else {}


class TestBinning:
    @pytest.fixture
    def binned(self, pipe):
        """The same pipeline around a model for 256 x 256 pixels, for which there is a table."""
        torch.manual_seed(0)
        config = dict(pipe.transformer.config) | {"sample_size": 32, "num_layers": 1}
        return quiet(type(pipe).from_pipe(pipe, transformer=LocalDiTTransformer2DModel.from_config(config).eval()))

    def test_samples_at_the_bin_and_returns_the_size_asked_for(self, binned):
        calls = []
        binned.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args[0].shape, kwargs["added_cond_kwargs"])), with_kwargs=True
        )
        arguments = {"height": 190, "width": 250, "use_resolution_binning": True}
        picture = latents_of(binned, output_type="pil", **arguments)[0]
        assert picture.size == (250, 190)
        height, width = ASPECT_RATIO_BINS[256]["0.78"]  # next to 190 / 250
        assert latents_of(binned, **arguments).shape[-2:] == (height // 8, width // 8)
        for shape, conditions in calls:
            assert shape[-2:] == (height // 8, width // 8)
            assert conditions["resolution"].tolist() == [[height, width]]

    def test_off_by_default(self, binned):
        assert latents_of(binned, height=192, width=256).shape[-2:] == (24, 32)

    def test_refuses_sizes_that_are_not_positive(self, binned):
        with pytest.raises(ValueError, match=r"`height` .* 0; the nearest valid value is 16"):
            latents_of(binned, height=0, width=256, use_resolution_binning=True)

    def test_no_table_for_the_model(self, pipe):
        sizes = {"height": 64, "width": 96}
        assert torch.equal(latents_of(pipe, use_resolution_binning=True, **sizes), latents_of(pipe, **sizes))

    @pytest.mark.parametrize("module", [pipeline_localdit, pipeline_localdit_img2img])
    def test_every_bin_is_a_valid_size(self, module):
        assert [*module.ASPECT_RATIO_BINS] == [256, 512, 1024, 2048]
        for side, table in module.ASPECT_RATIO_BINS.items():
            assert table["1.0"] == [side, side]
            assert all(height % 16 == 0 == width % 16 for height, width in table.values())


class TestCallbacks:
    def test_sees_every_step(self, pipe):
        seen = []

        def callback(pipeline, step, timestep, tensors):
            assert pipeline is pipe and pipe.current_timestep is timestep
            seen.append((step, int(timestep), {name: tensor.shape for name, tensor in tensors.items()}))
            return tensors

        names = list(pipe._callback_tensor_inputs)
        result = latents_of(
            pipe, max_sequence_length=50, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
        )
        assert [step for step, *_ in seen] == list(range(pipe.num_timesteps))
        assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps[-pipe.num_timesteps :].tolist()
        shapes = dict(zip(names, [(1, 4, 16, 16), (1, 50, 32), (1, 50), (1, 50, 32), (1, 50)]))
        assert all(found == shapes for *_, found in seen)
        assert pipe.current_timestep is None
        assert torch.equal(result, latents_of(pipe, max_sequence_length=50))

    def test_interrupt(self, pipe, transformer_calls):
        kept = []

        def callback(pipeline, step, timestep, tensors):
            kept.append(tensors["latents"])
            pipeline._interrupt = step == 1
            return {}

        result = latents_of(pipe, num_inference_steps=6, callback_on_step_end=callback)
        assert len(transformer_calls) == 2 and pipe.interrupt
        assert torch.equal(result, kept[1])
        latents_of(pipe)
        assert not pipe.interrupt

    def test_replaces_latents(self, pipe):
        other = torch.full((1, 4, 16, 16), 0.25)

        def callback(pipeline, step, timestep, tensors):
            return {"latents": other} if step == pipeline.num_timesteps - 1 else tensors

        assert torch.equal(latents_of(pipe, callback_on_step_end=callback), other)

    def test_replaces_the_prompt(self, pipe, transformer_calls):
        names = pipe._callback_tensor_inputs[1:]
        blue = pipe.encode_prompt("a blue square", negative_prompt="red")

        def callback(pipeline, step, timestep, tensors):
            return dict(zip(names, blue))

        latents_of(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert not torch.allclose(transformer_calls[0]["encoder_hidden_states"], torch.cat([blue[2], blue[0]]))
        for call in transformer_calls[1:]:
            assert torch.equal(call["encoder_hidden_states"], torch.cat([blue[2], blue[0]]))
            assert torch.equal(call["encoder_attention_mask"], torch.cat([blue[3], blue[1]]))

    def test_diffusers_guidance_cutoff(self, pipe, transformer_calls):
        callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        latents_of(pipe, callback_on_step_end=callback)
        assert [len(call["sample"]) for call in transformer_calls] == [2] + [1] * (pipe.num_timesteps - 1)


class TestStepCache:
    """Text and sizes are embedded once, and again when they change."""

    @pytest.fixture
    def embeddings(self, components):
        calls = []
        handle = components["transformer"].caption_projection.register_forward_pre_hook(
            lambda module, args: calls.append(args[0])
        )
        yield calls
        handle.remove()

    def test_once_per_call(self, pipe, embeddings):
        for call in range(2):
            latents_of(pipe)
            assert len(embeddings) == call + 1

    def test_hooks_that_move_inputs_keep_it(self, pipe, embeddings):
        """As model offload does."""
        add_hook_to_module(pipe.transformer, AlignDevicesHook("cpu", io_same_device=True))
        latents_of(pipe)
        remove_hook_from_module(pipe.transformer)
        assert len(embeddings) == 1

    def test_a_callback_that_changes_text_weights_or_guidance(self, pipe, embeddings, monkeypatch):
        names = pipe._callback_tensor_inputs[1:]
        blue = pipe.encode_prompt("a blue square", negative_prompt="red")

        def to_blue(pipeline, step, timestep, tensors):
            return dict(zip(names, blue)) if step == 0 else {}

        def in_place(pipeline, step, timestep, tensors):
            tensors["prompt_embeds"].mul_(0.5)
            return {}

        def weights(pipeline, step, timestep, tensors):
            """As LoRA layers that are turned off halfway."""
            scale = 0.5 if step < pipeline.num_timesteps - 1 else 2 ** (pipeline.num_timesteps - 1)
            pipeline.transformer.caption_projection.linear_2.weight.data.mul_(scale)
            return {}

        cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
        callbacks = [(to_blue, "latents"), (in_place, "prompt_embeds"), (weights, "latents"), (cutoff, "latents")]

        def latents() -> list[torch.Tensor]:
            return [
                latents_of(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[tensor])
                for callback, tensor in callbacks
            ]

        cached = latents()
        assert len(embeddings) == len(callbacks) * pipe.num_timesteps
        monkeypatch.setattr(pipe.transformer, "make_step_cache", lambda: None)
        expected = latents()
        assert all(torch.equal(*latents) for latents in zip(cached, expected))


class TestRefusals:
    """Each names the argument that is wrong."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"height": 100}, "`height` must be a positive multiple of 16 but is 100; the nearest valid value is 96"),
            ({"width": 0}, "`width` .* 0; the nearest valid value is 16"),
            ({"height": -64, "use_resolution_binning": True}, "`height` .* -64; the nearest valid value is 16"),
            ({"prompt": []}, "`prompt` is an empty list"),
            ({"prompt": [PROMPT, 3]}, "`prompt` must be a `str` or a list of `str`"),
            ({"prompt": None}, "Exactly one of `prompt` and `prompt_embeds` .* neither"),
            ({"negative_prompt": []}, "`negative_prompt` is an empty list"),
            ({"negative_prompt": ["red", "blue"]}, "`negative_prompt` must be one text or a list of 1"),
            ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1 but is 0"),
            ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1 but is 0"),
            ({"max_sequence_length": 0}, "`max_sequence_length` must be at least 1 but is 0"),
            ({"guidance_scale": math.inf}, "`guidance_scale` must be a finite number but is inf"),
            ({"guidance_scale": math.nan}, "`guidance_scale` must be a finite number but is nan"),
            ({"output_type": "jpeg"}, "`output_type` .* 'jpeg'"),
            ({"generator": seeded(0, 1, 2)}, "`generator` must be one generator or a list of 1, .* has 3"),
            (
                {"callback_on_step_end_tensor_inputs": ["latents", "x"]},
                r"`callback_on_step_end_tensor_inputs` .*\['x'\]",
            ),
            ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "`latents` must be finite"),
            ({"latents": torch.zeros(1, 4, 16, 16), "height": 64}, r"`latents` must have the shape \(1, 4, 8, 16\)"),
            ({"latents": torch.zeros(2, 4, 16, 16)}, r"`latents` must have the shape \(1, 4, 16, 16\)"),
            ({"latents": torch.zeros(1, 4, 15, 16)}, "`height` .* 120; the nearest valid value is 128"),
            ({"prompt_attention_mask": torch.ones(1, 120)}, "`prompt_embeds` and `prompt_attention_mask` .* together"),
        ],
    )
    def test_arguments(self, pipe, transformer_calls, arguments, message):
        with pytest.raises(ValueError, match=message):
            pipe(**{"prompt": PROMPT, **with_image(pipe), **arguments})
        assert not transformer_calls

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prompt": PROMPT}, "Exactly one of `prompt` and `prompt_embeds` .* both"),
            ({"negative_prompt": "red"}, "Only one of `negative_prompt` and `negative_prompt_embeds`"),
            ({"prompt_attention_mask": None}, "`prompt_embeds` and `prompt_attention_mask` .* together"),
            ({"negative_prompt_attention_mask": None}, "`negative_prompt_embeds` and .* together"),
            ({"prompt_embeds": torch.zeros(50, 32)}, r"`prompt_embeds` must have the shape \(prompts, tokens, 32\)"),
            ({"prompt_embeds": torch.zeros(2, 50, 16)}, r"`prompt_embeds` must have the shape \(2, 50, 32\)"),
            ({"prompt_attention_mask": torch.ones(2, 49)}, r"`prompt_attention_mask` must have the shape \(2, 50\)"),
            ({"negative_prompt_embeds": torch.zeros(1, 50, 32)}, "`negative_prompt_embeds` .*shape"),
            ({"negative_prompt_attention_mask": torch.ones(2, 50, 1)}, "`negative_prompt_attention_mask` .*shape"),
        ],
    )
    def test_embeddings(self, pipe, transformer_calls, arguments, message):
        embeddings = {
            "prompt_embeds": torch.zeros(2, 50, 32),
            "prompt_attention_mask": torch.ones(2, 50),
            "negative_prompt_embeds": torch.zeros(2, 50, 32),
            "negative_prompt_attention_mask": torch.ones(2, 50),
        }
        with pytest.raises(ValueError, match=message):
            pipe(**{**embeddings, **with_image(pipe), **arguments})
        assert not transformer_calls

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"strength": 1.2}, "`strength` .* 1.2; the nearest valid value is 1.0"),
            ({"strength": -0.2}, r"`strength` .* -0.2; the nearest valid value is 0.05"),
            ({"strength": float("nan")}, "`strength`"),
            ({"strength": 0.04}, r"`strength` must be from 0.05 \(one of 20 steps\) to 1.0 but is 0.04"),
            ({"image": None}, "`image` must be a PIL image"),
            ({"image": []}, "`image` must be a PIL image"),
            ({"image": "picture.png"}, "`image` must be a PIL image"),
            ({"image": np.zeros((64, 64), np.float32)}, "`image` must be a PIL image"),
            ({"image": [PICTURE] * 2}, "`image` must hold 1 picture or 3, one per prompt, but holds 2"),
            ({"image": np.zeros((64, 64, 4), np.float32)}, "`image` must have 3 colours"),
            ({"image": torch.zeros(1, 64, 64)}, "`image` must have 3 colours"),
            ({"image": torch.full((3, 64, 64), 255.0)}, "`image` must have values from 0 to 1"),
            ({"image": np.asarray(PICTURE)}, "`image` must have values from 0 to 1"),
            ({"image": torch.full((3, 64, 64), torch.nan)}, "`image` must have values from 0 to 1"),
            ({"image": torch.full((4, 8, 8), torch.nan)}, "`image` must be finite"),
            ({"image": torch.zeros(4, 8, 8), "height": 128}, r"`image` must have the shape \(1, 4, 16, 8\)"),
        ],
    )
    def test_images(self, image_to_image, transformer_calls, arguments, message):
        with pytest.raises(ValueError, match=message):
            image_to_image(**{"prompt": [PROMPT] * 3, "image": PICTURE, **arguments})
        assert not transformer_calls

    @given(size=st.integers(-100, 5000))
    def test_nearest_size_in_the_message(self, components, size):
        pipe = LocalDiTPipeline(**components)
        arguments = [1, 1.0, 1, 120, "pil", []]
        if size > 0 and size % 16 == 0:
            pipe.check_inputs(size, 64, *arguments)
            return
        with pytest.raises(ValueError, match="`height`") as error:
            pipe.check_inputs(size, 64, *arguments)
        nearest = int(re.search(r"nearest valid value is (\d+)\.$", str(error.value)).group(1))
        pipe.check_inputs(nearest, 64, *arguments)
        assert abs(nearest - size) == min(abs(valid - size) for valid in range(16, 5200, 16))

    def test_latents_without_a_size(self, components):
        with pytest.raises(ValueError, match=r"`latents` must have the shape \(1, 4, 16, 16\) but has \(16,\)"):
            LocalDiTPipeline(**components)(PROMPT, latents=torch.zeros(16))

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_numbers_that_are_not_finite_while_sampling(self, pipe, components, monkeypatch, bad):
        original, calls = components["transformer"].forward, []

        def forward(*args, **kwargs):
            calls.append(1)
            (sample,) = original(*args, **kwargs)
            return (sample * bad if len(calls) == 2 else sample,)

        monkeypatch.setattr(components["transformer"], "forward", forward)
        with pytest.raises(ValueError, match=r"became NaN or infinite at step 2 of 4 \(timestep"):
            latents_of(pipe, num_inference_steps=4 if isinstance(pipe, LocalDiTPipeline) else 5)


class TestFromPipe:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_shares_components_and_dtypes_both_ways(self, text_to_image, copy_of, dtype):
        text_to_image = copy_of(text_to_image, torch_dtype={"transformer": dtype})
        image_to_image = LocalDiTImg2ImgPipeline.from_pipe(text_to_image)
        back = LocalDiTPipeline.from_pipe(image_to_image)
        for pipe in (image_to_image, back):
            assert pipe.components.keys() == text_to_image.components.keys()
            assert all(pipe.components[name] is component for name, component in text_to_image.components.items())
            assert pipe.transformer.dtype == dtype
            assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32
        assert back.config._name_or_path == text_to_image.config._name_or_path

    def test_same_for_auto_pipelines(self, text_to_image, copy_of):
        text_to_image = copy_of(text_to_image, torch_dtype={"transformer": torch.bfloat16})
        image_to_image = AutoPipelineForImage2Image.from_pipe(text_to_image)
        back = AutoPipelineForText2Image.from_pipe(image_to_image)
        assert (type(image_to_image), type(back)) == (LocalDiTImg2ImgPipeline, LocalDiTPipeline)
        for pipe in (image_to_image, back):
            assert all(pipe.components[name] is component for name, component in text_to_image.components.items())
            assert pipe.transformer.dtype == torch.bfloat16

    def test_replaces_and_casts_what_it_is_told(self, pipe, copy_of):
        pipe = copy_of(pipe)
        scheduler = DDIMScheduler()
        new_pipe = type(pipe).from_pipe(pipe, scheduler=scheduler, torch_dtype=torch.bfloat16)
        assert new_pipe.scheduler is scheduler and pipe.scheduler is not scheduler
        assert new_pipe.transformer is pipe.transformer and pipe.transformer.dtype == torch.bfloat16

    def test_refuses_what_is_no_component(self, pipe):
        with pytest.raises(ValueError, match=r"got \['unet'\]"):
            type(pipe).from_pipe(pipe, unet=None)


class TestSaveAndLoad:
    def test_round_trip(self, pipe, tmp_path, caplog):
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["_class_name"] == type(pipe).__name__
        assert index["transformer"] == ["diffusers_localdit", "LocalDiTTransformer2DModel"]
        expected = latents_of(pipe)
        for loader in (type(pipe), DiffusionPipeline):
            loaded = quiet(loader.from_pretrained(tmp_path))
            assert type(loaded) is type(pipe)
            assert torch.equal(latents_of(loaded), expected)
        assert "Expected types" not in caplog.text

    def test_one_folder_serves_both(self, text_to_image, image_to_image, tmp_path):
        text_to_image.save_pretrained(tmp_path)
        loaded = quiet(LocalDiTImg2ImgPipeline.from_pretrained(tmp_path))
        assert torch.equal(latents_of(loaded), latents_of(image_to_image))


@pytest.mark.parametrize(
    "pipeline, start, side", [(LocalDiTPipeline, {}, 32), (LocalDiTImg2ImgPipeline, {"image": PICTURE}, 128)]
)
def test_vae_of_another_scale(pipeline, start, side, components):
    """One of two levels, which makes one of 2 x 2 pixels, not of 8 x 8."""
    torch.manual_seed(0)
    vae = components["vae"]
    config = dict(vae.config) | {"block_out_channels": (8, 8)}
    config |= {f"{way}_block_types": config[f"{way}_block_types"][:2] for way in ("down", "up")}
    pipe = quiet(pipeline(**components | {"vae": type(vae).from_config(config).eval()}))
    settings = {"num_inference_steps": STEPS, "generator": seeded(0)} | start
    assert pipe(PROMPT, **settings).images[0].size == (side, side)
    sizes = {"height": 36, "width": 52, "use_resolution_binning": False}
    assert pipe(PROMPT, **settings, **sizes).images[0].size == (52, 36)
    with pytest.raises(ValueError, match="multiple"):
        pipe(PROMPT, **settings, **sizes | {"height": 38})


class TestLora:
    def test_round_trip(self, pipe, copy_of, tmp_path):
        trained = copy_of(pipe).transformer
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        trained.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
        layers = get_peft_model_state_dict(trained)
        type(pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)

        plain = latents_of(pipe)
        expected = latents_of(quiet(type(pipe).from_pipe(pipe, transformer=trained)))
        assert not torch.allclose(expected, plain)
        loaded = copy_of(pipe)
        loaded.load_lora_weights(tmp_path / "lora", adapter_name="shapes")
        assert relative_error(latents_of(loaded), expected) < 1e-5
        assert relative_error(latents_of(loaded, attention_kwargs={"scale": 0.0}), plain) < 1e-5
        loaded.fuse_lora()
        assert relative_error(latents_of(loaded), expected) < 1e-4
        loaded.unfuse_lora()
        loaded.unload_lora_weights()
        assert relative_error(latents_of(loaded), plain) < 1e-4


class TestCaches:
    @pytest.fixture
    def block_calls(self, pipe):
        calls = []
        handle = pipe.transformer.transformer_blocks[-1].ff.register_forward_pre_hook(
            lambda module, args: calls.append(pipe.current_timestep)
        )
        yield calls
        handle.remove()
        pipe.transformer.disable_cache()

    def test_first_block_cache(self, pipe, block_calls):
        exact = latents_of(pipe, num_inference_steps=6)
        block_calls.clear()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        assert relative_error(latents_of(pipe, num_inference_steps=6), exact) < 1e-5
        assert len(block_calls) == pipe.num_timesteps
        pipe.transformer.disable_cache()

        block_calls.clear()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        first, second = (latents_of(pipe, num_inference_steps=6) for _ in range(2))
        assert len(block_calls) == 2, "only the first step of each call runs the later blocks"
        assert torch.equal(first, second), "the second call starts with an empty cache"

    def test_pyramid_attention_broadcast(self, pipe):
        """Reads `current_timestep`: attention is skipped at every second timestep within the range."""
        projections = []
        attention = pipe.transformer.transformer_blocks[0].cross_attn
        handle = attention.to_q.register_forward_pre_hook(lambda *args: projections.append(int(pipe.current_timestep)))
        pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                cross_attention_block_skip_range=2,
                cross_attention_timestep_skip_range=(0, 700),
                cross_attention_block_identifiers=("transformer_blocks",),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )
        latents_of(pipe, num_inference_steps=10)
        pipe.transformer.disable_cache()
        handle.remove()
        timesteps = pipe.scheduler.timesteps[-pipe.num_timesteps :].tolist()
        outside = [timestep for timestep in timesteps if timestep >= 700]
        assert outside == [timestep for timestep in projections if timestep >= 700]
        assert 0 < len(projections) - len(outside) < len(timesteps) - len(outside)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_transformer_stays_near_float32(self, pipe, copy_of, transformer_calls, dtype):
        half_pipe = copy_of(pipe, torch_dtype={"transformer": dtype})
        inputs, outputs = [], []
        half_pipe.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
        half_pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0].dtype))
        expected = latents_of(pipe, guidance_scale=2.0)
        latents = latents_of(half_pipe, guidance_scale=2.0)
        assert set(inputs) == set(outputs) == {dtype}
        assert latents.dtype == torch.float32
        assert relative_error(latents, expected) < 2e-2

    def test_latents_of_any_dtype_are_sampled_in_float32(self, pipe):
        start = torch.randn(1, 4, 16, 16, generator=seeded(0)).half()
        assert torch.equal(latents_of(pipe, latents=start), latents_of(pipe, latents=start.float()))


class TestOffload:
    def test_group_offload_changes_nothing(self, pipe, copy_of):
        expected = latents_of(pipe)
        offloaded = copy_of(pipe)
        offloaded.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(latents_of(offloaded), expected)


class TestSources:
    """Each file is shipped alone, so what both need stands in both."""

    MODULES = (pipeline_localdit, pipeline_localdit_img2img)

    def members(self, pipeline_class):
        """Source of each function that the class itself defines, without the comment above it."""
        for name, member in vars(pipeline_class).items():
            function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
            if inspect.isfunction(function):
                yield name, inspect.getsource(function)

    def test_copies_are_equal_and_marked(self):
        original = dict(self.members(LocalDiTPipeline))
        copies = dict(self.members(LocalDiTImg2ImgPipeline))
        source = inspect.getsource(LocalDiTImg2ImgPipeline)
        marked = re.findall(r"# Copied from diffusers_localdit\.pipeline_localdit\.LocalDiTPipeline\.(\w+)\n", source)
        assert len(marked) == source.count("# Copied from")
        assert {name for name in marked if copies[name] != original[name]} == set()
        assert original.keys() & copies.keys() - set(marked) == {"__init__", "__call__", "prepare_latents"}
        for name in marked:
            comment = source.index(f"LocalDiTPipeline.{name}\n")
            assert f" {name}(" in source[comment:].split("def", 1)[1].split(":")[0]

    @pytest.mark.parametrize("module", MODULES)
    def test_file_stands_alone(self, module):
        assert get_relative_imports(module.__file__) == []
        classes = [member for member in vars(module).values() if inspect.isclass(member)]
        own = [
            member for member in classes if issubclass(member, DiffusionPipeline) and member is not DiffusionPipeline
        ]
        assert len(own) == 1
