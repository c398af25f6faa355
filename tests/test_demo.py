"""The demo without a browser: what it accepts, paints and stops, and that it holds with many visitors at once."""

import io
import socket
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipeline_fixtures import make_components

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, cli
from diffusers_localdit.demo.examples import examples_of
from diffusers_localdit.demo.limits import MAX_LETTERS, MAX_UPLOAD_BYTES, Range, check_settings, ranges_of, read_upload
from diffusers_localdit.demo.painter import Painter, Step
from diffusers_localdit.model_info import BUNDLED_NAME
from diffusers_localdit.png_settings import read_settings, settings_chunks

gradio = pytest.importorskip("gradio", reason="the demo needs gradio (extra demo)")
from demo_server import ask, download, free_port, serving_bundled_model  # noqa: E402

from diffusers_localdit.demo.app import BUNDLED_NOTE, KEPT_PICTURES, Page, launch  # noqa: E402

SETTINGS = {
    "prompt": "a red circle on a white background",
    "negative_prompt": "",
    "width": 64,
    "height": 48,
    "steps": 3,
    "guidance_scale": 1.5,
    "seed": 5,
}


@pytest.fixture(scope="module")
def painter():
    return Painter(BUNDLED_NAME, "float32", "cpu")


@pytest.fixture(scope="module")
def ranges(painter):
    return ranges_of(painter.text_to_image)


@pytest.fixture(scope="module")
def page(painter, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("cache")))
        yield Page(painter, examples_of(BUNDLED_NAME))


@pytest.fixture
def sketch(tmp_path) -> Path:
    image = Image.linear_gradient("L").resize((70, 50)).convert("RGBA")
    image.getexif()[0x0112] = 6  # lies on its side
    image.save(tmp_path / "sketch.png", exif=image.getexif())
    return tmp_path / "sketch.png"


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_that_claims(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class TestLimits:
    @given(value=st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans()))
    def test_a_number_is_one_of_the_range_or_refused(self, value):
        sizes = Range(16, 256, 16)
        try:
            checked = sizes.check("Width", value)
        except ValueError as error:
            assert str(error) == f"Width must be a whole number from 16 to 256 in steps of 16 but is {value!s:.40}"
            assert type(value) not in (int, float) or value not in range(16, 257, 16)
        else:
            assert checked == value and checked in range(16, 257, 16) and type(checked) is int

    @given(value=st.floats(-1000, 1000))
    def test_what_is_nearest_is_accepted(self, value):
        for numbers in (Range(16, 256, 16), Range(1, 50, 1)):
            nearest = numbers.nearest(value)
            assert numbers.check("Number", nearest) == nearest
            assert abs(nearest - value) <= numbers.step / 2 or nearest in (numbers.low, numbers.high)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 1024}, "Width must be a whole number from 16 to 256 in steps of 16 but is 1024"),
            ({"height": 100}, "Height must be a whole number from 16 to 256 in steps of 16 but is 100"),
            ({"steps": 1000}, "Steps must be a whole number from 1 to 50 but is 1000"),
            ({"steps": 2.5}, "Steps must be a whole number from 1 to 50 but is 2.5"),
            ({"guidance_scale": 1e9}, "Guidance scale must be a number from 1.0 to 20.0 but is 1000000000.0"),
            ({"guidance_scale": 10**400}, f"Guidance scale must be a number from 1.0 to 20.0 but is 1{39 * '0'}"),
            ({"seed": None}, "Seed must be a whole number from 0 to 4,294,967,295 but is None"),
            ({"prompt": " \n"}, "Prompt is empty; say what to draw"),
            ({"prompt": "a" * (MAX_LETTERS + 1)}, "Prompt has 2,001 letters; at most 2,000 are taken"),
            ({"negative_prompt": None}, "Negative prompt must be a text but is None"),
            ({"strength": 0.1, "steps": 4}, "Strength 0.1 of 4 steps leaves none; choose more of one of them"),
        ],
    )
    def test_settings(self, change, message, ranges):
        assert check_settings(SETTINGS, ranges) == SETTINGS
        with pytest.raises(ValueError) as error:
            check_settings(SETTINGS | change, ranges)
        assert str(error.value) == message

    def test_settings_at_the_ends_of_their_ranges(self, ranges):
        lowest = {"width": 16, "height": 16, "steps": 1, "guidance_scale": 1.0, "strength": 1.0, "seed": 0}
        highest = {
            "width": 256,
            "height": 256,
            "steps": 50,
            "guidance_scale": 20.0,
            "strength": 1.0,
            "seed": 2**32 - 1,
        }
        weakest = highest | {"strength": 0.05}
        for ends in (lowest, highest, weakest):
            assert check_settings(SETTINGS | ends, ranges) == SETTINGS | ends
        for name, beyond in (("guidance_scale", 0.9), ("guidance_scale", 20.1), ("strength", 0.04), ("strength", 1.1)):
            with pytest.raises(ValueError, match=f"must be a number from .* but is {beyond}"):
                check_settings(SETTINGS | {name: beyond}, ranges)
        for name, beyond in (
            ("width", 0),
            ("height", 272),
            ("steps", 0),
            ("steps", 51),
            ("seed", -1),
            ("seed", 2**32),
        ):
            with pytest.raises(ValueError, match=f"must be a whole number from .* but is {beyond}"):
                check_settings(SETTINGS | {name: beyond}, ranges)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (png_that_claims(5000, 5000), "The picture has 5,000 x 5,000 pixels; at most 16,777,216 are taken"),
            (png_that_claims(12000, 12000), "The picture has 12,000 x 12,000 pixels; at most 16,777,216 are taken"),
            (png_that_claims(2**31 - 1, 2**31 - 1), "The picture has too many pixels; send a smaller one"),
            (png_that_claims(64, 64), "The picture cannot be read: its file is damaged"),
            (b"", "The file is no PNG, JPEG or WEBP picture"),
            (b"a text", "The file is no PNG, JPEG or WEBP picture"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "The file is no PNG, JPEG or WEBP picture"),
            (b"GIF89a" + bytes(20), "The file is no PNG, JPEG or WEBP picture"),
            (b"\x89PNG\r\n\x1a\n", "The file is no PNG, JPEG or WEBP picture"),
            (bytes(20 * 2**20 + 1), "The file has more than 20 MiB; send a smaller one"),
        ],
    )
    def test_uploads(self, content, message, tmp_path):
        (tmp_path / "upload.png").write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_upload(tmp_path / "upload.png")
        assert str(error.value) == message

    def test_no_upload(self):
        with pytest.raises(ValueError, match="There is no picture to start from; choose one"):
            read_upload(None)

    def test_a_truncated_upload_is_damaged(self, tmp_path):
        content = io.BytesIO()
        Image.effect_noise((64, 64), 50).save(content, "PNG")
        (tmp_path / "upload.png").write_bytes(content.getvalue()[:2000])
        with pytest.raises(ValueError, match="its file is damaged"):
            read_upload(tmp_path / "upload.png")

    def test_an_upload_is_turned_upright_and_loses_its_transparency(self, sketch):
        image = read_upload(sketch)
        assert (image.mode, image.size) == ("RGB", (50, 70))


class TestPainter:
    def test_steps_and_then_the_picture_of_the_pipeline(self, painter):
        *steps, picture = painter.paint(SETTINGS)
        assert steps == [Step(1, 3), Step(2, 3), Step(3, 3)]
        pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        sizes = {"width": 64, "height": 48}
        (expected,) = pipe(
            SETTINGS["prompt"], num_inference_steps=3, guidance_scale=1.5, generator=generator, **sizes
        ).images
        assert np.array_equal(pixels(picture), pixels(expected))

    def test_from_a_picture_only_the_steps_that_strength_leaves(self, painter, sketch):
        image = read_upload(sketch)
        *steps, picture = painter.paint(SETTINGS | {"steps": 4, "strength": 0.5}, image)
        assert steps == [Step(1, 2), Step(2, 2)]
        assert picture.size == (64, 48)

    @pytest.mark.parametrize("done", [1, 2])
    def test_closing_stops_after_the_step(self, done, painter, monkeypatch):
        alone = list(painter.paint(SETTINGS))[-1]
        calls = []
        predict = LocalDiTPipeline.predict_noise
        monkeypatch.setattr(LocalDiTPipeline, "predict_noise", lambda *args: calls.append(1) or predict(*args))
        progress = painter.paint(SETTINGS | {"steps": 50})
        for _ in range(done):
            next(progress)
        progress.close()  # waits until nothing runs any more
        assert done <= len(calls) <= done + 2
        calls.clear()
        assert np.array_equal(pixels(list(painter.paint(SETTINGS))[-1]), pixels(alone))
        assert len(calls) == 3

    def test_closed_before_its_turn_it_never_runs(self, painter):
        first, second = painter.paint(SETTINGS | {"steps": 50}), painter.paint(SETTINGS)
        next(first)
        with ThreadPoolExecutor(1) as pool:  # waits for the first step of the second
            waiting = pool.submit(next, second)
            first.close()
            assert waiting.result() == Step(1, 3)
        second.close()

    def test_closing_the_painter_ends_the_picture(self):
        painter = Painter(BUNDLED_NAME, "float32", "cpu")
        progress = painter.paint(SETTINGS | {"steps": 50})
        assert next(progress) == Step(1, 50)
        painter.close()
        steps = []
        with pytest.raises(ValueError, match="The demo is about to end"):
            steps.extend(progress)
        assert len(steps) <= 2

    def test_errors_of_the_pipeline_arrive(self, painter):
        with pytest.raises(ValueError, match="`width` must be a positive multiple of 16 but is 17"):
            list(painter.paint(SETTINGS | {"width": 17}))
        assert isinstance(list(painter.paint(SETTINGS))[-1], Image.Image)


class TestExamples:
    def test_those_of_the_bundled_model(self):
        examples = examples_of(BUNDLED_NAME)
        assert len(examples) >= 6
        assert any(example.start is not None for example in examples)
        for path, settings, start in examples:
            assert settings["guidance_scale"] == 1.5 and settings["negative_prompt"] == ""
            assert Image.open(path).size == (settings["width"], settings["height"])
            assert start is None or start.parent == path.parent

    def test_what_is_no_example_is_left_out_and_nothing_outside_of_the_folder_is_named(self, tmp_path):
        folder = tmp_path / "model" / "images"
        folder.mkdir(parents=True)
        image = Image.new("RGB", (16, 16))
        image.save(tmp_path / "secret.png")
        image.save(folder / "without_settings.png")
        image.save(folder / "escapes.png", pnginfo=settings_chunks(SETTINGS | {"image": "../../secret.png"}))
        image.save(folder / "fine.png", pnginfo=settings_chunks(SETTINGS | {"image": "without_settings.png"}))
        (folder / "broken.png").write_bytes(b"")
        assert [(example.path.name, example.start.name) for example in examples_of(str(tmp_path / "model"))] == [
            ("fine.png", "without_settings.png")
        ]


class TestPage:
    def run(self, page, form=None, **change) -> list[dict]:
        form = form or page.text_form
        return list(page.generate(form, **({"random_seed": False, "paths": []} | SETTINGS | change)))

    def test_form_starts_with_what_suits_the_model(self, page, tmp_path, monkeypatch):
        values = {name: control.value for name, control in page.text_form.controls.items()}
        assert (values["guidance_scale"], values["negative_prompt"]) == (1.5, "")
        assert (values["width"], values["height"], values["steps"]) == (128, 128, 20)
        assert BUNDLED_NOTE in page.header()

        LocalDiTPipeline(**make_components(tmp_path)).save_pretrained(tmp_path / "tiny")
        monkeypatch.chdir(tmp_path)
        other = Page(Painter("tiny", "float32", "cpu"), [])
        assert other.painter.made_by["model"] == str(tmp_path / "tiny")
        header = other.header()
        assert "tiny, " in header and str(tmp_path) not in header and BUNDLED_NOTE not in header
        values = {name: control.value for name, control in other.image_form.controls.items()}
        assert (values["guidance_scale"], values["width"], values["strength"]) == (7.0, 128, 0.8)

    def test_progress_then_the_picture_with_its_settings(self, page):
        _, *steps, last = self.run(page)
        assert [step[page.result.status] for step in steps] == [
            f'<div role="status">Step {n} of 3</div><progress value="{n}" max="3" aria-hidden="true"></progress>'
            for n in (1, 2, 3)
        ]
        (path,) = last[page.paths]
        assert read_settings(path).items() >= SETTINGS.items()
        for label, value in (("Prompt", SETTINGS["prompt"]), ("Seed", 5), ("Steps", 3), ("Guidance scale", 1.5)):
            assert f"<dt>{label}</dt><dd>{value}</dd>" in last[page.result.settings]
        assert last[page.result.download].value["path"] == path

    def test_the_command_repeats_the_file(self, page, tmp_path, sketch, capsys):
        (path,) = self.run(page)[-1][page.paths]
        assert cli.main(["generate", "--like", path, "--output", str(tmp_path / "again.png")]) == 0
        assert np.array_equal(pixels(tmp_path / "again.png"), pixels(Path(path)))
        assert read_settings(tmp_path / "again.png") == read_settings(path)

        (path,) = self.run(page, page.image_form, start=str(sketch), strength=0.7)[-1][page.paths]
        assert cli.main(["img2img", str(sketch), "--like", path, "--output", str(tmp_path / "again.png")]) == 0
        assert np.array_equal(pixels(tmp_path / "again.png"), pixels(Path(path)))
        assert read_settings(tmp_path / "again.png") == read_settings(path)

    def test_random_seeds_are_shown_and_kept(self, page):
        seeds = set()
        for _ in range(3):
            last = self.run(page, random_seed=True, steps=1)[-1]
            seed = last[page.text_form.controls["seed"]]
            assert read_settings(last[page.paths][0])["seed"] == seed
            seeds.add(seed)
        assert len(seeds) == 3

    def test_texts_of_visitors_are_no_markup(self, page):
        last = self.run(page, prompt="<img src=x onerror=alert(1)>", steps=1)[-1]
        assert "<dd>&lt;img src=x onerror=alert(1)&gt;</dd>" in last[page.result.settings]
        with pytest.raises(gradio.Error, match=r"Steps must .* but is &lt;b&gt;"):
            self.run(page, steps="<b>")

    def test_earlier_pictures(self, page):
        paths = []
        for seed in range(KEPT_PICTURES + 2):
            paths = self.run(page, seed=seed, steps=1, width=16, height=16, paths=paths)[-1][page.paths]
        assert [read_settings(path)["seed"] for path in paths] == list(range(KEPT_PICTURES + 1, 1, -1))
        _, settings, download = page.show_earlier(paths, gradio.SelectData(None, {"index": 3, "value": None}))
        assert "<dt>Seed</dt><dd>10</dd>" in settings and download.value["path"] == paths[3]

    def test_an_example_fills_in_its_form(self, page):
        for index, (path, settings, start) in enumerate(page.examples):
            changed = page.fill_in(gradio.SelectData(None, {"index": index, "value": None}))
            form = page.text_form if start is None else page.image_form
            assert changed[page.tabs].selected == ("text" if start is None else "image")
            assert changed[form.random_seed] is False
            assert changed[form.controls["prompt"]] == settings["prompt"]
            filled_in = {name: changed[control] for name, control in form.controls.items()}
            first = {} if start is None else {"start": changed[form.start]}
            (again,) = self.run(page, form, **filled_in, **first)[-1][page.paths]
            # On another machine the last bits differ, and so do a few pixels by one.
            assert np.abs(pixels(Path(again)).astype(int) - pixels(path)).max() <= 4
            assert read_settings(again) == settings

    def test_sizes_fit_the_start(self, page, sketch, tmp_path):
        assert page.fitting_sizes(str(sketch)) == (48, 64)
        Image.new("RGB", (4000, 10)).save(tmp_path / "wide.png")
        assert page.fitting_sizes(str(tmp_path / "wide.png")) == (256, 16)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 100_000}, "Width must be a whole number from 16 to 256 in steps of 16 but is 100000"),
            ({"prompt": ""}, "Prompt is empty; say what to draw"),
        ],
    )
    def test_refusals_are_messages(self, change, message, page):
        with pytest.raises(gradio.Error) as error:
            self.run(page, **change)
        assert error.value.message == message

    def test_too_little_memory_is_a_message(self, page, monkeypatch):
        def paint(*_):
            yield Step(1, 3)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(page.painter, "paint", paint)
        with pytest.raises(gradio.Error) as error:
            self.run(page)
        assert error.value.message == "Out of memory: choose a smaller size"


class TestServer:
    """Over HTTP. Here in this process, so that the tests see what the pipeline does."""

    @pytest.fixture(scope="class")
    def address(self, page, tmp_path_factory):
        address = launch(page, "127.0.0.1", free_port()).rstrip("/")
        yield address
        page.app.close()

    @pytest.fixture
    def calls(self, monkeypatch):
        """Grows with every call of the transformer."""
        calls = []
        predict = LocalDiTPipeline.predict_noise
        monkeypatch.setattr(LocalDiTPipeline, "predict_noise", lambda *args: calls.append(1) or predict(*args))
        return calls

    @staticmethod
    def values(**change) -> list:
        settings = {**SETTINGS, "random_seed": False} | change
        return [settings[name] for name in (*SETTINGS, "random_seed")]

    def test_picture_arrives_with_its_settings(self, address, painter):
        name, (seed, status, picture, *_) = ask(address, "text_to_image", *self.values())
        assert name == "complete" and seed == 5 and "Done" in status
        content = download(address, picture["value"])
        assert read_settings(io.BytesIO(content)).items() >= SETTINGS.items()
        expected = list(painter.paint(SETTINGS))[-1]
        assert np.array_equal(pixels(Image.open(io.BytesIO(content))), pixels(expected))

    @pytest.mark.parametrize("way", ["leaves", "cancels"])
    def test_a_picture_that_nobody_waits_for_is_given_up(self, way, address, calls):
        values = self.values(steps=50, width=128, height=128)
        with httpx.Client(base_url=f"{address}/gradio_api", timeout=None, trust_env=False) as client:
            functions = client.get(f"{address}/config").json()["dependencies"]
            text_to_image = next(function["id"] for function in functions if function["api_name"] == "text_to_image")
            visit = {"session_hash": way, "fn_index": text_to_image}
            event = client.post("/queue/join", json=visit | {"data": [*values, None]}).json()
            with client.stream("GET", "/queue/data", params=visit) as events:
                next(line for line in events.iter_lines() if "Step 2 of 50" in line)
                if way == "cancels":
                    client.post("/cancel", json=visit | event).raise_for_status()
        assert ask(address, "text_to_image", *self.values())[0] == "complete"  # is made after what still runs
        assert 2 + 3 <= len(calls) < 25

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"width": 100_000}, "Width must be a whole number from 16 to 256 in steps of 16 but is 100000"),
            ({"steps": "many"}, "Steps must be a whole number from 1 to 50 but is many"),
        ],
    )
    def test_refusals(self, change, message, address):
        name, error = ask(address, "text_to_image", *self.values(**change))
        assert name == "error" and error["error"] == message

    def test_uploads(self, address, sketch):
        def answer(content: bytes) -> tuple[str, object]:
            upload = {"files": ("sketch.png", content)}
            (path,) = httpx.post(f"{address}/gradio_api/upload", files=upload, trust_env=False).json()
            start = {"path": path, "meta": {"_type": "gradio.FileData"}}
            settings = {**SETTINGS, "strength": 0.7, "random_seed": False}
            order = ["prompt", "negative_prompt", "strength", "width", "height", "steps", "guidance_scale", "seed"]
            return ask(address, "image_to_image", start, *(settings[name] for name in order), False)

        name, (_, _, picture, *_) = answer(sketch.read_bytes())
        assert name == "complete"
        assert "image_sha256" in read_settings(io.BytesIO(download(address, picture["value"])))
        for content, message in (
            (png_that_claims(5000, 5000), "The picture has 5,000 x 5,000 pixels; at most 16,777,216 are taken"),
            (b"no picture", "The file is no PNG, JPEG or WEBP picture"),
        ):
            name, error = answer(content)
            assert name == "error" and error["error"] == message

    def test_a_file_that_is_too_large_is_not_even_kept(self, address):
        upload = {"files": ("huge.png", bytes(MAX_UPLOAD_BYTES + 1))}
        answer = httpx.post(f"{address}/gradio_api/upload", files=upload, trust_env=False)
        assert answer.status_code == 413

    def test_files_of_the_server_are_no_start(self, address, tmp_path):
        Image.new("RGB", (16, 16)).save(tmp_path / "private.png")
        start = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
        name, _ = ask(address, "image_to_image", start, "a", "", 0.7, 64, 48, 3, 1.5, 5, False)
        assert name == "error"

    def test_addresses_are_no_start_and_nothing_is_fetched_from_them(self, address, monkeypatch):
        fetched = []
        fetch = "gradio.processing_utils.async_ssrf_protected_download"
        monkeypatch.setattr(fetch, lambda url, **_: fetched.append(url))
        start = {"path": "http://127.0.0.1:9/picture.png", "meta": {"_type": "gradio.FileData"}}
        name, error = ask(address, "image_to_image", start, "a", "", 0.7, 64, 48, 3, 1.5, 5, False)
        assert name == "error"
        assert error["error"] == "The picture to start from must be uploaded, not named by its address"
        assert not fetched


class TestManyVisitors:
    COUNT = 20

    def test_each_gets_a_picture_of_its_own_and_memory_stays(self, tmp_path, painter):
        settings = [SETTINGS | {"seed": seed, "steps": 2} for seed in range(self.COUNT)]
        with serving_bundled_model(tmp_path) as server, ThreadPoolExecutor(self.COUNT) as visitors:

            def visit(values: dict) -> np.ndarray:
                name, (_, _, picture, *_) = ask(server.address, "text_to_image", *values.values(), False)
                assert name == "complete"
                return pixels(Image.open(io.BytesIO(download(server.address, picture["value"]))))

            memory, pictures = [], []
            for _ in range(2):  # the first round warms up
                pictures = list(visitors.map(visit, settings))
                memory.append(server.rss())
        for values, picture in zip(settings, pictures, strict=True):
            assert np.array_equal(picture, pixels(list(painter.paint(values))[-1]))
        # What gradio keeps of each visitor is bounded by `KEPT_VISITORS`; nothing else may grow.
        assert memory[1] - memory[0] < self.COUNT * 300_000, memory


class TestCommand:
    def test_arguments(self, monkeypatch):
        served = []
        monkeypatch.setattr("diffusers_localdit.demo.serve", lambda *arguments: served.append(arguments))
        assert cli.main(["demo"]) == 0
        options = ["--host", "0.0.0.0", "--port", "80", "--model", "a/b", "--device", "cpu", "--dtype", "float16"]
        assert cli.main(["demo", *options]) == 0
        assert served == [
            (BUNDLED_NAME, "127.0.0.1", None, None, None), ("a/b", "0.0.0.0", 80, "cpu", "float16"),
        ]  # fmt: skip

    def test_without_gradio(self, monkeypatch, capsys):
        monkeypatch.delitem(sys.modules, "diffusers_localdit.demo.app")
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert cli.main(["demo"]) == 2
        assert "the demo needs gradio: pip install 'diffusers-localdit[demo]'" in capsys.readouterr().err

    def test_errors_in_one_line(self, capsys):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            for arguments, message in (
                (["--model", "no where"], "there is no folder no where, nor can this be a repository id"),
                (["--port", str(port)], f"the port {port} of 127.0.0.1 cannot be listened on"),
            ):
                assert cli.main(["demo", *arguments]) == 2
                assert message in capsys.readouterr().err.splitlines()[-1]
        with pytest.raises(SystemExit, match="2"):
            cli.main(["demo", "--port", "65536"])
        assert "argument --port: 65536 is not from 1 to 65535" in capsys.readouterr().err
