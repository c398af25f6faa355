"""The command `localdit`, in real processes where a process could make a difference, else by its `main`."""

import inspect
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from pipeline_fixtures import make_components
from safetensors.torch import load_file

import diffusers_localdit
from diffusers_localdit import BUNDLED_MODEL, LocalDiTImg2ImgPipeline, LocalDiTPipeline, cli, loading
from diffusers_localdit.cli import main
from diffusers_localdit.kernels import try_cpu_kernels
from diffusers_localdit.loading import default_dtype
from diffusers_localdit.packed_linear import pack_linears, why_not_packed
from diffusers_localdit.png_settings import SETTINGS, read_settings, settings_chunks
from diffusers_localdit.precision import fast_dtype

ROOT = Path(__file__).parents[1]
LOCALDIT = Path(sys.executable).with_name("localdit")
QUICK = ("--steps", 2, "--seed", 7)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    LocalDiTPipeline(**make_components(folder)).save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture
def sketch(tmp_path) -> Path:
    image = Image.new("RGB", (70, 50), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 40, 40), fill="red")
    image.save(tmp_path / "sketch.png")
    return tmp_path / "sketch.png"


def as_the_command_has_it(pipeline_class: type, model: Path) -> DiffusionPipeline:
    """In the dtype that this processor is good at, with the CPU kernels if they serve and weights laid out for it."""
    device = torch.device("cpu")
    pipe = pipeline_class.from_pretrained(model, dtype=fast_dtype(device))
    try_cpu_kernels(pipe.transformer)
    if why_not_packed(device, pipe.dtype) is None:
        pack_linears(pipe.transformer)
    return pipe


def run(*arguments) -> int:
    """The exit code, in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code


def start(*arguments, **options) -> subprocess.Popen:
    arguments = [str(argument) for argument in arguments]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def error_of(capsys) -> str:
    """The message on the one line that standard error has."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("localdit: error: ")


class TestHelp:
    @pytest.mark.parametrize("command", ["generate", "img2img", "convert", "info"])
    def test_loads_no_model(self, command, capsys, monkeypatch):
        monkeypatch.setattr(cli, "load_pipeline", None)
        assert run(command, "--help") == 0
        assert f"usage: localdit {command}" in capsys.readouterr().out

    def test_version(self, capsys):
        assert run("--version") == 0
        assert capsys.readouterr().out == f"localdit {diffusers_localdit.__version__}\n"


class TestErrors:
    """One line on standard error, exit code 2."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "the following arguments are required: COMMAND"),
            (("draw",), "invalid choice: 'draw'"),
            (("generate",), "give a PROMPT"),
            (("generate", "a", "--steps", "0"), "argument --steps: 0 is not at least 1"),
            (("generate", "a", "--guidance-scale", "nan"), "argument --guidance-scale: nan is no finite number"),
            (("generate", "a", "--width", "wide"), "argument --width: invalid positive value: 'wide'"),
            (("generate", "a", "--seed", "-1"), "argument --seed: -1 is not from 0 to 2**63 - 1"),
            (("generate", "a", "--dtype", "int4"), "argument --dtype: invalid choice: 'int4'"),
            (("generate", "\udcff"), "argument PROMPT: invalid text value"),
            (("generate", "a", "--device", "abacus"), "there is no device 'abacus'; choose --device "),
            (("generate", "a", "--device", "meta"), "the device meta is not available here; choose --device "),
            (("generate", "a", "--device", "cpu", "--offload", "model"), "--offload model needs an accelerator"),
            (("generate", "a", "--device", "cpu", "--offload", "group"), "--offload group needs an accelerator"),
            (("generate", "a", "--model", "/no/such/model"), "there is no folder /no/such/model"),
            (("generate", "a", "--model", "{tmp}"), "{tmp} holds no pipeline"),
            (("generate", "a", "--model", "{tmp}", "--output", "a.gif"), "expected .png, .jpg, .jpeg, .webp"),
            (("generate", "a", "b", "--model", "{tmp}", "--output", "a.png"), "a.png is one file for 2 pictures"),
            (("generate", "--like", "{tmp}/missing.png"), "cannot read {tmp}/missing.png"),
            (("img2img", "{tmp}/missing.png", "a", "--model", "{tmp}"), "{tmp}/missing.png is not a valid path"),
            (("info", "/no/such/model"), "there is no folder /no/such/model"),
            (("info", "{tmp}"), "is no LocalDiT: its transformer is not there"),
            (("convert", "{tmp}/missing.pt", "{tmp}/out"), "{tmp}/missing.pt does not exist"),
        ],
    )  # fmt: skip
    def test_message(self, arguments, message, tmp_path, capsys):
        assert run(*(argument.format(tmp=tmp_path) for argument in arguments)) == 2
        assert message.format(tmp=tmp_path) in error_of(capsys)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--height", 100), "`height` must be a positive multiple of 16 but is 100; the nearest valid"),
            (("--output", "{tmp}/file/picture.png"), "cannot write {tmp}/file/picture.png"),
        ],
    )  # fmt: skip
    def test_message_after_loading(self, arguments, message, model, tmp_path, capsys):
        (tmp_path / "file").write_text("no folder")
        arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
        assert run("generate", "a", "--model", model, "--output", tmp_path, *arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("localdit: error: " + message.format(tmp=tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_broken_model(self, model, tmp_path, capsys):
        shutil.copytree(model, tmp_path / "broken")
        os.truncate(tmp_path / "broken" / "transformer" / "diffusion_pytorch_model.safetensors", 3000)
        assert run("generate", "a", "--model", tmp_path / "broken", "--output", tmp_path) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(
            f"localdit: error: cannot load the model {tmp_path / 'broken'}: Unable to load weights"
        )

    def test_debug_shows_the_traceback(self, tmp_path, capsys):
        assert run("convert", tmp_path / "missing.pt", tmp_path / "out", "--debug") == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Traceback") and "CheckpointError" in lines[-2]
        assert lines[-1].startswith("localdit: error: ")

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (RuntimeError("a bug\nof ours"), 1, "unexpected RuntimeError: a bug; run with --debug and report it"),
            (torch.OutOfMemoryError("CUDA"), 2, "out of memory: try --offload group, --dtype bfloat16 or"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )  # fmt: skip
    def test_other_exceptions(self, error, code, message, model, capsys, monkeypatch):
        def fail(*_):
            raise error

        monkeypatch.setattr(cli, "load_pipeline", fail)
        assert run("generate", "a", "--model", model) == code
        assert error_of(capsys).startswith(message)

    def test_interrupted_process(self, model, tmp_path):
        output = tmp_path / "out"
        # A shell starts what it runs in the background with this signal ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process = start(LOCALDIT, "generate", "a", "--model", model, "--steps", 1000, "--output", output)
        while not process.stderr.readline().startswith("[1/1]"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "localdit: error: interrupted" and "Traceback" not in errors
        assert list(tmp_path.iterdir()) == []


def test_accelerators_are_counted(monkeypatch):
    monkeypatch.setattr(loading, "get_device", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1"):
        assert loading.usable_device(name) == torch.device(name)
    for name in ("cuda:2", "xpu"):
        with pytest.raises(ValueError, match=f"the device {name} is not available here; choose --device cuda"):
            loading.usable_device(name)


class TestGenerate:
    def test_like_repeats_a_picture_in_another_process(self, model, tmp_path, monkeypatch, capsys):
        options = ("--negative-prompt", "blue, grün", "--height", 64, "--width", 96, "--guidance-scale", 3.3)
        arguments = ("a red circle", *options, *QUICK, "--output", "first.png")
        # The model by a relative path, the repetition in another folder.
        monkeypatch.chdir(model.parent)
        assert run("generate", *arguments, "--model", model.name) == 0
        assert capsys.readouterr().out == "first.png\n"
        first = model.parent / "first.png"
        module = (sys.executable, "-m", "diffusers_localdit")
        finish(start(*module, "generate", "--like", first, "--output", "second.png", cwd=tmp_path))

        assert read_settings(first) == {
            "prompt": "a red circle",
            "negative_prompt": "blue, grün",
            "seed": 7,
            "steps": 2,
            "guidance_scale": 3.3,
            "height": 64,
            "width": 96,
            "model": str(model),
            "dtype": default_dtype(torch.device("cpu")),
            "device": "cpu",
            "scheduler": "DPMSolverMultistepScheduler",
            "version": diffusers_localdit.__version__,
        }
        assert Image.open(first).text["localdit:prompt"] == "a red circle"
        assert Image.open(first).size == (96, 64)
        assert first.read_bytes() == (tmp_path / "second.png").read_bytes()

    def test_every_picture_can_be_repeated_alone(self, model, tmp_path, capsys):
        prompts = ("a red circle", "a blue square")
        assert run("generate", *prompts, "--num-images", 2, "--model", model, *QUICK, "--output", tmp_path) == 0
        names = ["a-red-circle-7.png", "a-red-circle-8.png", "a-blue-square-9.png", "a-blue-square-10.png"]
        assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
        assert [read_settings(tmp_path / name)["seed"] for name in names] == [7, 8, 9, 10]
        assert len({pixels(tmp_path / name).tobytes() for name in names}) == 4

        assert run("generate", "--like", tmp_path / names[2], "--output", tmp_path / "like.png") == 0
        alone = ("a blue square", "--model", model, "--steps", 2, "--seed", 9, "--output", tmp_path / "alone.png")
        assert run("generate", *alone) == 0
        for name in ("like.png", "alone.png"):
            assert (tmp_path / name).read_bytes() == (tmp_path / names[2]).read_bytes()

    def test_guidance_is_by_default_that_of_the_models_example_pictures(self, tmp_path):
        assert run("generate", "a red circle on a white background", "--steps", 2, "--output", tmp_path / "a.png") == 0
        example = next(iter(sorted((BUNDLED_MODEL / "images").glob("*.png"))))
        assert read_settings(tmp_path / "a.png")["guidance_scale"] == read_settings(example)["guidance_scale"] == 1.5

    def test_an_example_picture_need_not_say_its_guidance(self, model, tmp_path):
        model = shutil.copytree(model, tmp_path / "model")
        (model / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(
            model / "images" / "0.png", pnginfo=settings_chunks({"prompt": "a", "seed": 1})
        )
        assert run("generate", "a", "--model", model, "--steps", 1, "--output", tmp_path / "a.png") == 0
        default = inspect.signature(LocalDiTPipeline.__call__).parameters["guidance_scale"].default
        assert read_settings(tmp_path / "a.png")["guidance_scale"] == default

    def test_defaults_are_those_of_the_pipeline(self, model, tmp_path):
        assert run("generate", "a", "--model", model, "--output", tmp_path / "a.png", "--seed", 7) == 0
        parameters = inspect.signature(LocalDiTPipeline.__call__).parameters
        recorded = read_settings(tmp_path / "a.png")
        assert recorded["steps"] == parameters["num_inference_steps"].default
        assert recorded["guidance_scale"] == parameters["guidance_scale"].default
        assert (recorded["height"], recorded["width"], recorded["negative_prompt"]) == (128, 128, "")

        pipe = as_the_command_has_it(LocalDiTPipeline, model)
        expected = pipe("a", generator=torch.Generator().manual_seed(7)).images[0]
        assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))

    def test_seed_is_random_and_recorded(self, model, tmp_path):
        for name in ("a.png", "b.png"):
            assert run("generate", "a", "--model", model, "--steps", 1, "--output", tmp_path / name) == 0
        assert read_settings(tmp_path / "a.png")["seed"] != read_settings(tmp_path / "b.png")["seed"]

    def test_options_override_the_picture_to_repeat(self, model, tmp_path):
        first, second, third = (tmp_path / f"{name}.png" for name in "abc")
        assert run("generate", "a", "--model", model, *QUICK, "--dtype", "bfloat16", "--output", first) == 0
        assert run("generate", "b", "--like", first, "--seed", 8, "--width", 64, "--output", second) == 0
        changed = {"prompt": "b", "seed": 8, "width": 64}
        assert read_settings(second) == read_settings(first) | changed
        assert read_settings(second)["dtype"] == "bfloat16"

        options = ("--steps", 2, "--seed", 8, "--width", 64, "--dtype", "bfloat16")
        assert run("generate", "b", "--model", model, *options, "--output", third) == 0
        assert second.read_bytes() == third.read_bytes()

    def test_prompt_may_follow_options(self, model, tmp_path):
        assert run("generate", "--model", model, *QUICK, "--output", tmp_path / "a.png", "a red circle") == 0
        assert read_settings(tmp_path / "a.png")["prompt"] == "a red circle"

    def test_says_when_the_scheduler_is_another_one(self, model, tmp_path, capsys):
        first, edited = tmp_path / "a.png", tmp_path / "edited.png"
        assert run("generate", "a", "--model", model, *QUICK, "--output", first) == 0
        changed = read_settings(first) | {"scheduler": "DDIMScheduler"}
        Image.open(first).save(edited, pnginfo=settings_chunks(changed))
        capsys.readouterr()
        assert run("generate", "--like", edited, "--output", tmp_path / "b.png") == 0
        expected = f"{edited} was made with scheduler DDIMScheduler, but this is DPMSolverMultistepScheduler"
        assert expected in capsys.readouterr().err

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs an accelerator")
    @pytest.mark.parametrize(
        "offload, dtype", [("model", "bfloat16"), ("group", "float32"), ("sequential", "float32")]
    )
    def test_offload_changes_nothing(self, offload, dtype, model, tmp_path):
        """In half precision a layer that comes alone rounds once more: its GELU is not part of the product then."""
        for name, choice in (("a.png", "none"), ("b.png", offload)):
            arguments = ("--model", model, *QUICK, "--dtype", dtype, "--offload", choice, "--output", tmp_path / name)
            assert run("generate", "a", *arguments) == 0
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


class TestOutput:
    def test_a_folder_keeps_what_it_holds(self, model, tmp_path, capsys):
        for _ in range(3):
            assert run("generate", "A / red: circle!", "--model", model, *QUICK, "--output", tmp_path) == 0
        names = ["a-red-circle-7.png", "a-red-circle-7-2.png", "a-red-circle-7-3.png"]
        assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)

    def test_a_file_is_replaced_only_by_a_whole_one(self, model, tmp_path):
        output = tmp_path / "new" / "picture.png"
        arguments = ("generate", "a", "--model", model, *QUICK, "--output", output)
        assert run(*arguments) == 0
        before = output.read_bytes()
        assert run(*arguments, "--height", 100) == 2
        assert output.read_bytes() == before
        assert run(*arguments, "--height", 64) == 0
        assert Image.open(output).size == (128, 64)
        assert [path.name for path in output.parent.iterdir()] == ["picture.png"]

    @pytest.mark.parametrize("suffix", ["jpg", "webp"])
    def test_other_formats_carry_no_settings(self, suffix, model, tmp_path, capsys):
        output = tmp_path / f"picture.{suffix}"
        assert run("generate", "a", "--model", model, *QUICK, "--output", output) == 0
        assert Image.open(output).format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
        assert run("generate", "--like", output) == 2
        assert "as a PNG file" in capsys.readouterr().err

    @pytest.mark.parametrize("prompt", ["", "🟥" * 200, "../../up", "a" * 500])
    def test_names_from_odd_prompts(self, prompt, tmp_path):
        path = cli.free_path(tmp_path, prompt, 2**63 - 1)
        path.touch()
        assert path.parent == tmp_path and path.exists()


class TestImageToImage:
    def test_like_needs_the_same_image(self, model, sketch, tmp_path, capsys):
        first, second = tmp_path / "first.png", tmp_path / "second.png"
        arguments = ("--model", model, "--steps", 4, "--strength", 0.5, "--seed", 7, "--output", first)
        assert run("img2img", sketch, *arguments, "a red circle") == 0
        recorded = read_settings(first)
        assert (recorded["strength"], recorded["image"]) == (0.5, "sketch.png")
        assert (recorded["height"], recorded["width"]) == (48, 64)
        pipe = as_the_command_has_it(LocalDiTImg2ImgPipeline, model)
        options = {"strength": 0.5, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(7)}
        expected = pipe("a red circle", image=load_image(str(sketch)), **options).images[0]
        assert np.array_equal(pixels(first), np.asarray(expected))

        # The same pixels in another file.
        Image.open(sketch).save(tmp_path / "copy.bmp")
        assert run("img2img", tmp_path / "copy.bmp", "--like", first, "--output", second) == 0
        assert np.array_equal(pixels(second), pixels(first))

        Image.open(sketch).rotate(180).save(tmp_path / "other.png")
        capsys.readouterr()
        assert run("img2img", tmp_path / "other.png", "--like", first) == 2
        assert f"{first} was made from 'sketch.png', whose pixels {tmp_path / 'other.png'} has not" in error_of(capsys)
        assert run("generate", "--like", first) == 2
        assert error_of(capsys).endswith(f"repeat it with: localdit img2img IMAGE --like {first}")

    def test_like_of_a_picture_from_a_prompt(self, model, sketch, tmp_path, capsys):
        assert run("generate", "a", "--model", model, *QUICK, "--output", tmp_path / "a.png") == 0
        capsys.readouterr()
        assert run("img2img", sketch, "--like", tmp_path / "a.png") == 2
        assert error_of(capsys).endswith(f"repeat it with: localdit generate --like {tmp_path / 'a.png'}")

    def test_pictures_of_too_many_pixels(self, sketch, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # twice which is an error
        assert run("img2img", sketch, "a", "--output", tmp_path / "a.png") == 2
        assert f"{sketch} has too many pixels" in error_of(capsys)
        assert run("generate", "--like", sketch) == 2
        assert f"cannot read {sketch} as a PNG file" in error_of(capsys)

    def test_strength_out_of_range(self, model, sketch, tmp_path, capsys):
        arguments = ("--model", model, "--strength", 1.5, "--output", tmp_path / "a.png")
        assert run("img2img", sketch, "a", *arguments) == 2
        assert "`strength` must be from" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "a.png").exists()


class TestInfo:
    def table(self, capsys) -> dict[str, list[str]]:
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0]: re.split(r"\s{2,}", line)[1:] for line in lines if line}

    def test_components_memory_and_windows(self, model, capsys):
        assert run("info", model) == 0
        table = self.table(capsys)
        pipe = LocalDiTPipeline.from_pretrained(model)
        total = 0
        for name in ("text_encoder", "transformer", "vae"):
            component = getattr(pipe, name)
            count = sum(parameter.numel() for parameter in component.parameters())
            total += count
            memory = [f"{count * size / 1e6:,.1f} MB" for size in (4, 2)]
            assert table[name] == [type(component).__name__, f"{count:,}", "float32", *memory]
        assert table["all"][0] == f"{total:,}"
        assert table["tokenizer"] == [type(pipe.tokenizer).__name__]
        assert table["windows"] == ["4 x 4 tokens, shifted block by block by 0, 1, 2, 3"]
        assert table["global"] == ["yes"]
        assert table["default"] == ["128 x 128 pixels: 8 x 8 = 64 tokens in 4 windows a block"]

    def test_reads_headers_only(self, model, tmp_path, capsys):
        shutil.copytree(model, tmp_path / "headers")
        for path in (tmp_path / "headers").rglob("*.safetensors"):
            os.truncate(path, 8 + int.from_bytes(path.read_bytes()[:8], "little"))
        assert run("info", model) == 0
        expected = self.table(capsys)
        assert run("info", tmp_path / "headers") == 0
        table = self.table(capsys)
        assert list(table.values())[1:] == list(expected.values())[1:]

    def test_shards(self, model, tmp_path, capsys):
        LocalDiTPipeline.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="300KB")
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
        assert run("info", model) == 0
        expected = self.table(capsys)["all"]
        assert run("info", tmp_path) == 0
        assert self.table(capsys)["all"] == expected

    def test_missing_component(self, model, tmp_path, capsys):
        shutil.copytree(model, tmp_path / "incomplete")
        shutil.rmtree(tmp_path / "incomplete" / "vae")
        assert run("info", tmp_path / "incomplete") == 2
        assert error_of(capsys).endswith("has no vae, although its model_index.json lists one")

    @pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
    def test_json_that_is_no_object(self, name, model, tmp_path, capsys):
        shutil.copytree(model, tmp_path / "odd")
        (tmp_path / "odd" / name).write_text("[]")
        assert run("info", tmp_path / "odd") == 2
        assert error_of(capsys).endswith(f"{name} holds no JSON object")


def test_convert_and_back(tmp_path, capsys):
    original = ROOT / "tests" / "golden" / "window4_global" / "original_with_processor.pt"
    converted, back = tmp_path / "converted", tmp_path / "back.safetensors"
    assert run("convert", original, converted, "--dtype", "bfloat16") == 0
    assert run("info", converted) == 0
    output = capsys.readouterr().out
    assert "windows         4 x 4 tokens" in output and "bfloat16" in output
    assert run("convert", converted, back, "--to-original") == 0
    assert load_file(back).keys() == torch.load(original, weights_only=True).keys()


def test_model_from_the_hub(model, loopback_hub, tmp_path):
    code = f"""
from diffusers_localdit.cli import main
assert main(["info", "owner/tiny"]) == 0
assert main(["info", "owner/other"]) == 2
assert main(["generate", "a", "--model", "owner/tiny", "--steps", "2", "--seed", "7", "--output", "hub.png"]) == 0
assert main(["generate", "a", "--model", {str(model)!r}, "--steps", "2", "--seed", "7", "--output", "folder.png"]) == 0
"""
    hub = loopback_hub.emptied()
    hub.add("owner/tiny", model)
    environment = hub.environment(tmp_path / "home")
    output = finish(start(sys.executable, "-c", code, env=environment, cwd=tmp_path))

    assert re.search(r"transformer +LocalDiTTransformer2DModel +[\d,]+ +float32", output)
    weights = [(name, asked) for name, asked in hub.downloads if name.endswith(".safetensors")]
    assert len(weights) == 6
    assert {asked for _, asked in weights[:3]} == {"bytes=0-100000"}  # the headers, for `info`
    assert read_settings(tmp_path / "hub.png")["model"] == "owner/tiny"
    assert np.array_equal(pixels(tmp_path / "hub.png"), pixels(tmp_path / "folder.png"))


class TestSettings:
    values = st.fixed_dictionaries(
        {
            name: {
                str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
                int: st.integers(0, 2**63),
                float: st.floats(allow_nan=False),
            }[kind]
            for name, kind in SETTINGS.items()
        }
    )

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
    @given(values)
    def test_round_trip(self, tmp_path, values):
        Image.new("RGB", (4, 4)).save(tmp_path / "picture.png", pnginfo=settings_chunks(values))
        assert read_settings(tmp_path / "picture.png") == values

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
    @given(st.integers(0, 10**4), st.binary(min_size=0, max_size=4), st.booleans())
    @example(0, b"", True)
    def test_broken_files_raise_value_error(self, tmp_path, place, new, truncate):
        path = tmp_path / "picture.png"
        chunks = settings_chunks({"prompt": "ein grüner Kreis ● ", "seed": 3, "guidance_scale": 2.5})
        Image.new("RGB", (4, 4)).save(path, pnginfo=chunks)
        content = path.read_bytes()
        place %= len(content)
        path.write_bytes(content[:place] + new + (b"" if truncate else content[place + len(new) :]))
        try:
            assert isinstance(read_settings(path), dict)
        except ValueError as error:
            assert str(path) in str(error)

    def test_value_of_another_type(self, tmp_path):
        chunks = PngInfo()
        chunks.add_text("localdit:seed", "seven")
        Image.new("RGB", (4, 4)).save(tmp_path / "picture.png", pnginfo=chunks)
        with pytest.raises(ValueError, match="has seed='seven' among its settings, which is no int"):
            read_settings(tmp_path / "picture.png")

    def test_no_settings(self, tmp_path):
        Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
        with pytest.raises(ValueError, match="carries no settings"):
            read_settings(tmp_path / "picture.png")


def test_contact_sheet(model, tmp_path, capsys, monkeypatch):
    example = runpy.run_path(ROOT / "examples" / "contact_sheet.py", run_name="contact_sheet")
    monkeypatch.syspath_prepend(ROOT / "examples" / "shapes")
    from scenes import is_held_out

    assert all(is_held_out(prompt) for prompt in [*example["PROMPTS"], *example["SKETCHES"]])

    output = tmp_path / "out" / "sheet.png"
    example["main"](["--model", str(model), "--output", str(output)])
    assert capsys.readouterr().out == f"The contact sheet is in {output}\n"
    sheet = Image.open(output)

    # The first picture is where it belongs, and the one that its prompt and seed give alone.
    left, top, cell = example["GAP"], 18 + 2 * example["GAP"], example["CELL"]
    first = np.asarray(sheet.crop((left, top, left + cell, top + cell)), dtype=int)
    pipe = LocalDiTPipeline.from_pretrained(model)
    settings = {"guidance_scale": example["GUIDANCE_SCALE"], "generator": torch.Generator().manual_seed(0)}
    alone = pipe(example["PROMPTS"][0], **settings).images[0]
    assert np.abs(first - np.asarray(alone, dtype=int)).max() <= 1
