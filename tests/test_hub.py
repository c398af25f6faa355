"""Repositories of the Hub: what is in them, that they are verified, and uploads that fail in every way."""

import base64
import hashlib
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from hub_clients import (
    ROOT,
    TEMPLATES,
    assemble_tiny,
    environment_without_package,
    save_tiny_pipeline,
    template_for_tiny,
)
from huggingface_hub import InferenceClient, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import READ_TOKEN, TOKEN
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_localdit
from diffusers_localdit import (
    BUNDLED_MODEL,
    LocalDiTImg2ImgPipeline,
    LocalDiTPipeline,
    LocalDiTTransformer2DModel,
    hub,
)
from diffusers_localdit.cli import main
from diffusers_localdit.hub_latents import sample
from diffusers_localdit.png_settings import read_settings, settings_chunks

SOURCES = Path(diffusers_localdit.__file__).parent
CARDS = sorted(path for path in TEMPLATES.glob("*/README.md") if (path.parent / "model_index.json").exists())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def repository(model, tmp_path_factory) -> Path:
    return assemble_tiny(model, tmp_path_factory.mktemp("assembled") / "repository")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for path in folder.rglob("*.safetensors") for tensor in load_file(path).values()}


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class TestAssembly:
    def test_code_is_that_of_the_package(self, repository):
        for name, source in hub.REMOTE_CODE.items():
            assert (repository / name).read_bytes() == (SOURCES / source).read_bytes()
        assert {name for name in names(repository) if name.endswith(".py")} == {*hub.REMOTE_CODE}

    def test_weights_and_configurations_are_those_of_the_model(self, repository, model):
        taken = {name for name in names(model) if name != "model_index.json"}
        assert taken < names(repository)
        for name in taken:
            ours, theirs = (repository / name).read_bytes(), (model / name).read_bytes()
            if name.endswith("/config.json"):
                ours, theirs = json.loads(ours), json.loads(theirs)
                theirs.pop("_name_or_path", None)
            assert ours == theirs

    def test_nothing_tells_where_it_was_made(self, model, repository, tmp_path):
        pipe = LocalDiTPipeline.from_pretrained(model)
        pipe.save_pretrained(tmp_path / "saved")
        assert str(model) in (tmp_path / "saved" / "model_index.json").read_text()
        folder = assemble_tiny(tmp_path / "saved", tmp_path / "repository")
        for path in folder.rglob("*.json"):
            assert str(model) not in path.read_text() and "_name_or_path" not in path.read_text()

    def test_card_is_filled_in(self, repository):
        card = (repository / "README.md").read_text()
        assert "$" not in card and 'from_pretrained("owner/tiny")' in card
        assert "There is no text encoder here" not in card
        parameters = sum(
            tensor.numel()
            for tensor in load_file(repository / "transformer" / "diffusion_pytorch_model.safetensors").values()
        )
        assert re.search(rf"LocalDiTTransformer2DModel +{parameters:,} ", card)

    def test_card_shows_the_pictures_that_the_model_has(self, model, tmp_path):
        template = template_for_tiny("LocalDiT-1024", tmp_path / "template")
        missing = hub.assemble(model, tmp_path / "none", "owner/tiny", template)
        assert [example["output"]["url"] for example in missing] == ["images/lighthouse.png", "images/ramen.png"]
        widget = metadata_load(tmp_path / "none" / "README.md")["widget"]
        assert [example["text"] for example in widget] == [example["text"] for example in missing]
        assert not any("output" in example for example in widget)
        assert "<Gallery />" not in (tmp_path / "none" / "README.md").read_text()

        with_picture = Path(shutil.copytree(model, tmp_path / "model"))
        (with_picture / "images").mkdir()
        Image.new("RGB", (16, 16)).save(with_picture / "images" / "ramen.png")
        missing = hub.assemble(with_picture, tmp_path / "one", "owner/tiny", template)
        assert [example["output"]["url"] for example in missing] == ["images/lighthouse.png"]
        widget = metadata_load(tmp_path / "one" / "README.md")["widget"]
        assert [example.get("output") for example in widget] == [None, {"url": "images/ramen.png"}]
        assert (tmp_path / "one" / "images" / "ramen.png").exists()
        assert "\n<Gallery />\n" in (tmp_path / "one" / "README.md").read_text()

    def test_without_text_encoder_and_with_parts_of_another_pipeline(self, model, tmp_path):
        (tmp_path / "converted").mkdir()
        (tmp_path / "converted" / "transformer").symlink_to(model / "transformer")
        folder = assemble_tiny(
            tmp_path / "converted", tmp_path / "repository", base_pipeline=model, text_encoder=False
        )
        assert not {"text_encoder", "tokenizer"} & {name.split("/")[0] for name in names(folder)}
        pipe = LocalDiTPipeline.from_pretrained(folder)
        assert pipe.text_encoder is None and pipe.tokenizer is None
        assert "There is no text encoder here" in (folder / "README.md").read_text()
        parts = LocalDiTPipeline.from_pretrained(model)
        whole = LocalDiTPipeline.from_pretrained(folder, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer)
        assert torch.equal(sample(whole), sample(parts))
        expected = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.vae.state_dict().items())

    def test_a_text_encoder_that_the_model_has_is_left_out(self, model, tmp_path):
        folder = assemble_tiny(model, tmp_path / "repository", text_encoder=False)
        assert not {"text_encoder", "tokenizer"} & {name.split("/")[0] for name in names(folder)}
        assert LocalDiTPipeline.from_pretrained(folder).text_encoder is None

    def test_shards_variants_and_dtype(self, model, tmp_path):
        folder = assemble_tiny(
            model, tmp_path / "repository", dtype=torch.bfloat16, variants=["fp16"], max_shard_size=60_000
        )
        files = {name for name in names(folder) if name.startswith("transformer/") and "safetensors" in name}
        assert "transformer/diffusion_pytorch_model.safetensors" not in files
        assert len([name for name in files if re.search(r"model-\d{5}-of-\d{5}\.safetensors", name)]) > 1
        assert len([name for name in files if re.search(r"model\.fp16-\d{5}-of-\d{5}\.safetensors", name)]) > 1
        original = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
        for variant, dtype in ((None, torch.bfloat16), ("fp16", torch.float16)):
            loaded = LocalDiTTransformer2DModel.from_pretrained(
                folder, subfolder="transformer", variant=variant, dtype=dtype
            )
            for name, tensor in loaded.state_dict().items():
                assert torch.equal(tensor, original[name].to(dtype))
        assert stored_dtypes(folder / "transformer") == {torch.bfloat16, torch.float16}
        assert {path.suffix for path in (folder / "transformer").iterdir()} == {".json", ".py", ".safetensors"}

    def test_weights_are_stored_in_one_dtype_and_stay_in_it(self, model, repository, tmp_path):
        cast = assemble_tiny(model, tmp_path / "cast", dtype=torch.bfloat16)
        assert (stored_dtypes(repository), stored_dtypes(cast)) == ({torch.float32}, {torch.bfloat16})
        assert names(cast) == names(repository)
        split = assemble_tiny(cast, tmp_path / "split", max_shard_size=60_000)
        assert stored_dtypes(split) == {torch.bfloat16} and len(names(split)) > len(names(cast))

    def test_weights_that_cannot_be_cast_are_named(self, model, tmp_path):
        broken = Path(shutil.copytree(model, tmp_path / "broken"))
        (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(64))
        with pytest.raises(hub.PublishError, match="cannot load vae: "):
            assemble_tiny(broken, tmp_path / "repository", variants=["fp16"])
        assert not (tmp_path / "repository").exists()

    def test_own_variants_are_taken_over(self, model, tmp_path):
        pipe = LocalDiTPipeline.from_pretrained(model)
        pipe.save_pretrained(tmp_path / "saved")
        with torch.no_grad():
            pipe.transformer.proj_out.bias += 1
        for variant in ("ema", "fp16"):
            pipe.transformer.save_pretrained(tmp_path / "saved" / "transformer", variant=variant)
        folder = assemble_tiny(tmp_path / "saved", tmp_path / "repository", variants=["fp16"])
        for variant in ("ema", "fp16"):
            own = LocalDiTPipeline.from_pretrained(folder, variant=variant).transformer
            assert torch.equal(own.proj_out.bias, pipe.transformer.proj_out.bias)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda model, template: (model / "model_index.json").unlink(), "cannot read .*model_index.json: "),
            (lambda model, template: (model / "vae" / "config.json").write_text("{"), "cannot read .*config.json: "),
            (
                lambda model, template: change(model / "model_index.json", vae=["their_code", "AutoencoderKL"]),
                "has vae of their_code.AutoencoderKL; expected one of diffusers, ",
            ),
            (
                lambda model, template: change(model / "model_index.json", transformer=["a", "B"]),
                r"is no LocalDiT: its transformer is \['a', 'B'\]",
            ),
            (lambda model, template: (template / "README.md").unlink(), "has no README.md for the repository"),
            (lambda model, template: (template / "README.md").write_text("$nothing"), "known are repo_id, "),
            (
                lambda model, template: (model / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
                "vae has no .safetensors weights",
            ),
            (
                lambda model, template: (model / "transformer").rename(model / "unet"),
                "has no folder transformer; expected a saved pipeline",
            ),
        ],
    )  # fmt: skip
    def test_refusals_leave_nothing(self, spoil, message, model, tmp_path):
        broken = Path(shutil.copytree(model, tmp_path / "broken"))
        template = template_for_tiny("localdit-shapes", tmp_path)
        spoil(broken, template)
        with pytest.raises(ValueError, match=message):
            hub.assemble(broken, tmp_path / "repository", "owner/tiny", template)
        assert {path.name for path in tmp_path.iterdir()} == {"broken", "localdit-shapes"}

    def test_refuses_another_model_than_the_template_says(self, model, tmp_path):
        with pytest.raises(hub.PublishError, match="if this is another model, give it a folder of its own"):
            hub.assemble(model, tmp_path / "repository", "owner/LocalDiT-1024", TEMPLATES / "LocalDiT-1024")
        assert list(tmp_path.iterdir()) == []
        hub.assemble(BUNDLED_MODEL, tmp_path / "shapes", "owner/localdit-shapes", TEMPLATES / "localdit-shapes")
        for picture in BUNDLED_MODEL.glob("images/*.png"):
            assert (tmp_path / "shapes" / "images" / picture.name).read_bytes() == picture.read_bytes()


class TestIndex:
    """What other tools write into `model_index.json`, beside code that must not run where the package is."""

    @pytest.fixture
    def folder(self, repository, tmp_path):
        folder = Path(shutil.copytree(repository, tmp_path / "repository"))
        for name in (*hub.REMOTE_CODE, "transformer/transformer_localdit.py"):
            (folder / name).write_text("raise SystemExit('code of the repository ran')")
        return folder

    @pytest.mark.parametrize("pipeline_class", [LocalDiTPipeline, LocalDiTImg2ImgPipeline])
    @pytest.mark.parametrize("library", ["diffusers_localdit", "transformer_localdit", "diffusers_modules.local.x"])
    @pytest.mark.parametrize("name", ["LocalDiTPipeline", ["pipeline", "LocalDiTPipeline"]])
    def test_our_classes_are_those_of_the_package(self, pipeline_class, library, name, folder):
        change(folder / "model_index.json", _class_name=name, transformer=[library, "LocalDiTTransformer2DModel"])
        pipe = pipeline_class.from_pretrained(folder)
        assert type(pipe) is pipeline_class and type(pipe.transformer) is LocalDiTTransformer2DModel

    @pytest.mark.parametrize(
        "entries",
        [
            {"_class_name": ["pipeline", "TheirPipeline"]},
            {"vae": ["their_vae", "TheirVAE"]},
            {"transformer": ["transformer_localdit", "TheirTransformer"]},
        ],
    )
    def test_code_of_others_needs_trust(self, entries, folder):
        (folder / "vae" / "their_vae.py").write_text("raise SystemExit('code of the repository ran')")
        change(folder / "model_index.json", **entries)
        with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
            LocalDiTPipeline.from_pretrained(folder)


class TestPublish:
    """The command, in this process; verification starts processes of its own."""

    @pytest.fixture
    def arguments(self, model, tmp_path, monkeypatch):
        def upload(*_):
            raise AssertionError("uploaded")

        monkeypatch.setattr(hub, "upload", upload)
        monkeypatch.setattr(hub.HfApi, "whoami", lambda api: {"name": "owner"})
        template = template_for_tiny("localdit-shapes", tmp_path)
        return ["publish", str(model), "--repo-id", "owner/tiny", "--template", str(template)]

    def test_dry_run(self, arguments, tmp_path, capsys):
        assert main([*arguments, "--dry-run", "--output", str(tmp_path / "kept")]) == 0
        *listed, total, verified, last = capsys.readouterr().out.splitlines()
        sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listed}
        assert sizes == {name: (tmp_path / "kept" / name).stat().st_size for name in names(tmp_path / "kept")}
        assert total.split() == [f"{sum(sizes.values()):,}", "in", str(len(sizes)), "files"]
        assert verified.startswith("verified: ") and last == "dry run: nothing was uploaded to owner/tiny"

    def test_says_how_to_make_pictures_for_the_card(self, arguments, tmp_path, monkeypatch, capsys):
        arguments[1] = str(shutil.copytree(arguments[1], tmp_path / "with pictures"))
        monkeypatch.setattr(hub, "verify", lambda folder: None)
        assert main([*arguments, "--dry-run"]) == 0
        lines = capsys.readouterr().err.splitlines()
        commands = [shlex.split(line.split(": ", 1)[1])[1:] for line in lines if line.startswith("to have it")]
        assert len(commands) == 3
        for command in commands:
            assert main([*command, "--steps", "2"]) == 0
        capsys.readouterr()
        assert main([*arguments, "--dry-run"]) == 0
        said = capsys.readouterr()
        assert "no picture" not in said.err and said.out.count("  images/") == 3

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("return self._guidance_scale\n", "return 2 * self._guidance_scale\n", "give different latents"),
            ("import torch\n", "import torch_that_is_missing\n", "loading by the repository's own code: Module"),
        ],
    )
    def test_failed_verification_uploads_nothing(self, old, new, message, arguments, tmp_path, monkeypatch, capsys):
        source = (SOURCES / "pipeline_localdit.py").read_text()
        assert old in source
        (tmp_path / "pipeline.py").write_text(source.replace(old, new, 1))
        monkeypatch.setitem(hub.REMOTE_CODE, "pipeline.py", tmp_path / "pipeline.py")
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("localdit: error: verification failed") and message in error

    def test_a_kept_folder_is_replaced_if_it_is_a_models(self, arguments, tmp_path, monkeypatch, capsys):
        """As after an upload that failed, whose message says so."""
        monkeypatch.setattr(hub, "verify", lambda folder: None)
        arguments += ["--dry-run", "--output", str(tmp_path / "kept")]
        assert main(arguments) == 0
        assert main(arguments) == 2
        assert "exists; choose another output or pass --overwrite" in capsys.readouterr().err
        assert main([*arguments, "--overwrite"]) == 0
        shutil.rmtree(tmp_path / "kept")
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "letter.txt").write_text("mine")
        assert main([*arguments, "--overwrite"]) == 2
        assert "holds no converted model" in capsys.readouterr().err
        assert names(tmp_path / "kept") == {"letter.txt"}

    def test_a_model_of_variants_only(self, arguments, tmp_path, capsys):
        LocalDiTPipeline.from_pretrained(arguments[1]).save_pretrained(tmp_path / "half", variant="fp16")
        arguments[1] = str(tmp_path / "half")
        assert main([*arguments, "--dry-run"]) == 2
        assert "has weights of variants only; save the pipeline without `variant`" in capsys.readouterr().err

    def test_a_template_with_folders_in_folders(self, arguments, tmp_path, monkeypatch):
        monkeypatch.setattr(hub, "verify", lambda folder: None)
        note = Path(arguments[-1]) / "docs" / "more" / "note.txt"
        note.parent.mkdir(parents=True)
        note.write_text("a note")
        assert main([*arguments, "--dry-run", "--output", str(tmp_path / "kept")]) == 0
        assert (tmp_path / "kept" / "docs" / "more" / "note.txt").read_text() == "a note"

    def test_the_text_encoder_is_left_out(self, arguments, tmp_path, monkeypatch):
        monkeypatch.setattr(hub, "verify", lambda folder: None)
        assert main([*arguments, "--dry-run", "--no-text-encoder", "--output", str(tmp_path / "kept")]) == 0
        assert not (tmp_path / "kept" / "text_encoder").exists()

    def test_options_of_the_upload(self, arguments, monkeypatch, capsys):
        uploads = []
        monkeypatch.setattr(hub, "verify", lambda folder: None)
        monkeypatch.setattr(hub, "upload", lambda folder, *options: uploads.append(options) or "address")
        assert main(arguments) == 0
        assert main([*arguments, "--private", "--revision", "next"]) == 0
        assert uploads == [("owner/tiny", False, None), ("owner/tiny", True, "next")]
        assert capsys.readouterr().out.splitlines()[-1] == "address"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nowhere/at-all", "--repo-id", "a/b", "--dry-run"), "there is no folder nowhere/at-all"),
            (("localdit-shapes", "--repo-id", "a/b", "--dry-run"), "b has no README.md for the repository"),
            (("localdit-shapes", "--repo-id", "a b/c", "--dry-run"), "--repo-id: Repo id must use"),
            (("localdit-shapes", "--repo-id", "a/b"), "no login at the Hub (no such token); log in with `hf auth "),
        ],
    )
    @pytest.mark.parametrize("command", ["localdit", "script"])
    def test_errors_in_one_line(self, command, arguments, message, monkeypatch, capsys):
        def whoami(api):
            raise OSError("no such token\nat all")

        monkeypatch.setattr(hub.HfApi, "whoami", whoami)
        monkeypatch.setattr(sys, "argv", ["publish.py", *arguments])
        if command == "localdit":
            assert main(["publish", *arguments]) == 2
        else:
            with pytest.raises(SystemExit, match="2"):
                runpy.run_path(str(ROOT / "scripts" / "publish.py"), run_name="__main__")
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


# Evaluates an expression per line, with a token of its own. The client waits between its attempts, which takes long.
WORKER = """
import json, os, resource, sys, time
time.sleep = lambda seconds: None
from huggingface_hub import snapshot_download
from diffusers_localdit import conversion, hub
from diffusers_localdit.checkpoint_io import fetched

def on_full_disk(function, size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

for line in sys.stdin:
    os.environ["HF_TOKEN"], expression = json.loads(line)
    try:
        answer = {"result": str(eval(expression))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process with the real client, its login and its cache."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment | {"HF_HUB_VERBOSITY": "debug"},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.answers = []

    def ask(self, expression: str, token: str = TOKEN) -> dict[str, str]:
        self.process.stdin.write(json.dumps([token, expression]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        self.answers.append(line)
        return json.loads(line)

    def stop(self) -> str:
        """Everything that it wrote."""
        self.process.stdin.close()
        self.process.wait()
        return self.log.read_text() + "".join(self.answers)


class TestUpload:
    """Over the LFS path, in the order in which they stand: the tests share a server and a client."""

    @pytest.fixture(scope="class")
    def server(self, loopback_hub):
        return loopback_hub.emptied()

    @pytest.fixture(scope="class")
    def worker(self, server, tmp_path_factory):
        folder = tmp_path_factory.mktemp("worker")
        worker = Worker(server.environment(folder / "home"), folder)
        yield worker
        output = worker.stop()
        assert "Request " in output or "request" in output.lower()  # the log is on
        assert TOKEN not in output and READ_TOKEN not in output

    @pytest.fixture
    def changed(self, repository, tmp_path):
        """The repository's folder with other weights in two components and one file less."""
        folder = Path(shutil.copytree(repository, tmp_path / "changed"))
        for path in (folder / "transformer", folder / "vae"):
            weights = path / "diffusion_pytorch_model.safetensors"
            tensors = load_file(weights)
            next(iter(tensors.values())).add_(torch.rand(1).item() + 1)
            save_file(tensors, weights, metadata={"format": "pt"})
        (folder / "handler.py").unlink()
        return folder

    def head(self, server, repository="owner/tiny"):
        found = server.repositories[repository]
        return found.find("main")

    def contents(self, server, repository="owner/tiny") -> dict[str, bytes]:
        return {path: server.contents[file.sha256] for path, file in self.head(server, repository).files.items()}

    def test_one_commit_with_all_files(self, server, worker, repository):
        answer = worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny')")
        assert answer == {"result": f"{server.endpoint}/owner/tiny/commit/{self.head(server).oid}"}
        assert self.contents(server) == {name: (repository / name).read_bytes() for name in names(repository)}
        assert [commit.title for commit in server.repositories["owner/tiny"].commits][1:] == [
            "Publish with diffusers_localdit"
        ]

    def test_nothing_is_sent_twice(self, server, worker, repository):
        before, uploads = self.head(server), list(server.uploads)
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny')")
        assert self.head(server) == before
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/second')")
        assert server.uploads == uploads
        assert self.contents(server, "owner/second") == self.contents(server)

    def test_left_over_code_and_weights_are_deleted(self, server, worker, repository, changed):
        assert "result" in worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert "handler.py" not in self.contents(server)
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny')")
        assert "handler.py" in self.contents(server)

    def test_a_fault_of_the_server_is_tried_again(self, server, worker, changed):
        for request in ("POST /api/models/owner/tiny/preupload/", "PUT /objects/", "POST /objects/verify"):
            server.fail(request, 503)
        assert "result" in worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert self.contents(server) == {name: (changed / name).read_bytes() for name in names(changed)}

    @pytest.mark.parametrize(
        ("request_line", "answer", "advice"),
        [
            ("POST /api/models/owner/tiny/commit/", 503, "run the same command again"),
            ("POST /api/models/owner/tiny/commit/", "cut", "run the same command again"),
            ("POST /api/models/owner/tiny/commit/", 412, "somebody else committed meanwhile"),
            ("POST /api/models/owner/tiny/commit/", 403, "log in with `hf auth login`"),
            ("POST /api/models/owner/tiny/preupload/", 401, "log in with `hf auth login`"),
            ("PUT /objects/", "cut", "run the same command again"),
            ("PUT /objects/", 503, "run the same command again"),
        ],
    )
    def test_interrupted(self, request_line, answer, advice, server, worker, changed):
        before = self.head(server)
        server.fail(request_line, answer, times=50)
        error = worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")["error"]
        server.failures.clear()
        assert error.startswith("PublishError: the upload to owner/tiny failed (") and "\n" not in error
        assert f"the previous revision {before.oid} is intact" in error and advice in error
        assert self.head(server) == before

        assert "result" in worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert self.contents(server) == {name: (changed / name).read_bytes() for name in names(changed)}
        assert len(server.uploads) == len(set(server.uploads))

    def test_half_of_the_files_arrived(self, server, worker, changed):
        server.fail(f"PUT /objects/{sha256(changed / 'vae' / 'diffusion_pytorch_model.safetensors')}", "cut", times=50)
        before = self.head(server)
        assert "error" in worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        server.failures.clear()
        arrived = sha256(changed / "transformer" / "diffusion_pytorch_model.safetensors")
        assert arrived in server.uploads and self.head(server) == before
        assert "result" in worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert server.uploads.count(arrived) == 1

    @pytest.mark.parametrize("killed_at", ["upload", "commit"])
    def test_killed(self, killed_at, server, changed, tmp_path):
        """By SIGKILL, in the middle of a file when another one has arrived, or of the commit."""
        before = self.head(server)
        first, second = (changed / name / "diffusion_pytorch_model.safetensors" for name in ("transformer", "vae"))
        needed = [sha256(first)] if killed_at == "upload" else [sha256(first), sha256(second)]
        killed = Worker(server.environment(tmp_path / "home"), tmp_path)

        def kill():
            while not set(needed) <= set(server.uploads):
                time.sleep(0.01)
            killed.process.kill()
            killed.process.wait()

        place = f"PUT /objects/{sha256(second)}" if killed_at == "upload" else "POST /api/models/owner/tiny/commit/"
        server.fail(place, kill)
        with pytest.raises(AssertionError):  # it dies without an answer
            killed.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert killed.process.wait(timeout=60) == -signal.SIGKILL
        assert self.head(server) == before

        again = Worker(server.environment(tmp_path / "home"), tmp_path)
        assert "result" in again.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")
        assert TOKEN not in again.stop() + killed.log.read_text()
        assert self.contents(server) == {name: (changed / name).read_bytes() for name in names(changed)}
        assert [server.uploads.count(digest) for digest in (sha256(first), sha256(second))] == [1, 1]

    def test_somebody_else_commits_meanwhile(self, server, worker, repository, changed):
        """Between our look at the repository and our commit."""
        found = server.repositories["owner/tiny"]
        theirs = {"theirs.txt": server.store("theirs.txt", b"theirs")}
        head = found.find("main")
        late = f"lambda *args, **options: real(*args, **options | dict(parent_commit={head.oid!r}))"
        worker.ask("globals().update(real=hub.HfApi.create_commit)")
        worker.ask(f"setattr(hub.HfApi, 'create_commit', {late})")
        found.commit("main", "theirs", head.files | theirs)
        error = worker.ask(f"hub.upload({str(changed)!r}, 'owner/tiny')")["error"]
        worker.ask("setattr(hub.HfApi, 'create_commit', real)")
        assert "somebody else committed meanwhile" in error
        assert "theirs.txt" in self.contents(server)

    @pytest.mark.parametrize("token", [READ_TOKEN, "hf_unknown"])
    def test_no_right_to_write(self, token, server, worker, repository):
        error = worker.ask(f"hub.upload({str(repository)!r}, 'owner/new')", token=token)["error"]
        assert "nothing was published; log in with `hf auth login`" in error
        assert "owner/new" not in server.repositories

    def test_branch(self, server, worker, repository):
        before = self.head(server)
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny', revision='next')")
        assert self.head(server) == before
        found = server.repositories["owner/tiny"]
        published = found.find("next").files
        assert set(published) >= names(repository)
        # Again, onto what somebody added to the branch: old code goes, what is neither code nor weights stays.
        theirs = {name: server.store(name, name.encode()) for name in ("old.py", "notes.txt")}
        found.commit("next", "theirs", published | theirs)
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny', revision='next')")
        assert set(found.find("next").files) == set(published) | {"notes.txt"}

    def test_private(self, server, worker, repository):
        assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/secret', private=True)")
        assert server.repositories["owner/secret"].private
        error = worker.ask(f"hub.upload({str(repository)!r}, 'owner/second', private=True)")["error"]
        assert error == (
            "PublishError: owner/second exists and is public; make it private first, or leave out --private"
        )

    def test_full_disk_while_assembling(self, worker, model, repository, tmp_path):
        template = template_for_tiny("localdit-shapes", tmp_path)
        call = f"hub.assemble({str(model)!r}, {str(tmp_path / 'new')!r}, 'owner/tiny', {str(template)!r})"
        error = worker.ask(f"on_full_disk(lambda: {call}, 30_000)")["error"]
        assert error == f"CheckpointError: cannot write {tmp_path / 'new'}: File too large"
        assert [path.name for path in tmp_path.iterdir()] == ["localdit-shapes"]

    def test_full_disk_while_converting_back(self, worker, model, tmp_path):
        call = f"conversion.to_original({str(model / 'transformer')!r}, {str(tmp_path / 'new.pt')!r})"
        error = worker.ask(f"on_full_disk(lambda: {call}, 30_000)")["error"]
        assert error == f"CheckpointError: cannot write {tmp_path / 'new.pt'}: a file could not be written to its end"
        assert [*tmp_path.iterdir()] == []

    def test_interrupted_download_goes_on(self, server, worker):
        content = torch.rand(6_000_000).numpy().tobytes()  # the client keeps what arrived in pieces of 10 MiB
        server.add("owner/original", {"folder/LocalDiT.pt": content})
        address = "hf://owner/original/folder/LocalDiT.pt"

        error = worker.ask(f"on_full_disk(lambda: fetched({address!r}), 1_000_000)")["error"]
        assert error.startswith(f"CheckpointError: cannot download {address}: ") and "File too large" in error
        server.downloads.clear()
        server.fail("GET /objects/", "cut")
        path = worker.ask(f"fetched({address!r})")["result"]
        assert Path(path).read_bytes() == content
        assert [asked for _, asked in server.downloads] == [None, f"bytes={10 * 2**20}-"]

    @pytest.mark.parametrize(
        ("address", "message"),
        [("hf://owner", "cannot download hf://owner: "), ("hf://owner/original/none.pt", "Entry Not Found|404")],
    )
    def test_wrong_address(self, address, message, worker):
        error = worker.ask(f"fetched({address!r})")["error"]
        assert error.startswith("CheckpointError: ") and re.search(message, error) and "\n" not in error


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_upload_and_download_through_xet(repository, loopback_hub, tmp_path):
    (tmp_path / "store").mkdir()
    server = loopback_hub.emptied(tmp_path / "store")
    server.expect_through_xet(repository)
    worker = Worker(server.environment(tmp_path / "home", xet=True), tmp_path)
    assert "result" in worker.ask(f"hub.upload({str(repository)!r}, 'owner/tiny')")
    folder = Path(worker.ask("snapshot_download('owner/tiny')")["result"])
    before = server.repositories["owner/tiny"].find("main")
    (tmp_path / "changed").mkdir()
    save_file({"a": torch.rand(100_000)}, tmp_path / "changed" / "a.safetensors")
    server.fail("GET /api/models/owner/tiny/xet-write-token/", 403, times=50)
    error = worker.ask(f"hub.upload({str(tmp_path / 'changed')!r}, 'owner/tiny')")["error"]
    assert f"the previous revision {before.oid} is intact" in error
    assert server.repositories["owner/tiny"].find("main") == before
    output = worker.stop()
    assert {name: (folder / name).read_bytes() for name in names(folder)} == {
        name: (repository / name).read_bytes() for name in names(repository)
    }
    assert server.uploads == [] and not any(name.endswith(".safetensors") for name, _ in server.downloads)
    assert TOKEN not in output


# As the server of Inference Endpoints: what a handler raises is answered with 400.
ENDPOINT = """
import io, json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
import PIL.Image
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler

endpoint = EndpointHandler(sys.argv[1])

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            is_json = self.headers["Content-Type"] == "application/json"
            picture = endpoint(json.loads(body) if is_json else {"inputs": PIL.Image.open(io.BytesIO(body))})
            content = io.BytesIO()
            picture.save(content, "PNG")
            status, content = 200, content.getvalue()
        except Exception as error:
            status, content = 400, json.dumps({"error": str(error)}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


class TestHandler:
    """Where the package is not installed, as on an endpoint."""

    @pytest.fixture(scope="class")
    def client(self, repository, loopback_hub, tmp_path_factory):
        folder = tmp_path_factory.mktemp("endpoint")
        served = shutil.copytree(repository, folder / "repository")
        (served / "images").mkdir()
        Image.new("RGB", (16, 16)).save(served / "images" / "a.png", pnginfo=settings_chunks({"guidance_scale": 1.5}))
        python = environment_without_package(folder / "venv")
        process = subprocess.Popen(
            [python, "-c", ENDPOINT, served],
            env=loopback_hub.environment(folder / "home") | {"HF_HUB_OFFLINE": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=(folder / "log.txt").open("w"),
            text=True,
        )
        port = process.stdout.readline()
        assert port, (folder / "log.txt").read_text()
        yield InferenceClient(model=f"http://127.0.0.1:{int(port)}")
        process.terminate()
        process.wait()

    def test_text_to_image_is_that_of_the_pipeline(self, client, repository):
        settings = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 3.0}
        picture = client.text_to_image("a red circle", negative_prompt="a square", seed=5, **settings)
        pipe = LocalDiTPipeline.from_pretrained(repository)
        generator = torch.Generator().manual_seed(5)
        expected = pipe("a red circle", negative_prompt="a square", generator=generator, **settings).images[0]
        assert picture.tobytes() == expected.tobytes()

    def test_guidance_is_by_default_that_of_the_first_example(self, client):
        settings = {"height": 16, "width": 16, "num_inference_steps": 1, "seed": 0}
        default, same, other = (
            client.text_to_image("a red circle", **guidance, **settings)
            for guidance in ({}, {"guidance_scale": 1.5}, {"guidance_scale": 7.0})
        )
        assert default.tobytes() == same.tobytes() != other.tobytes()

    def test_without_a_seed_each_picture_is_another(self, client):
        settings = {"height": 16, "width": 16, "num_inference_steps": 1}
        first, second = (client.text_to_image("a red circle", **settings) for _ in range(2))
        assert first.tobytes() != second.tobytes()

    def test_large_pictures_are_made_as_large_as_the_model_can(self, client):
        sketch = io.BytesIO()
        Image.linear_gradient("L").resize((600, 32)).save(sketch, "PNG")
        picture = client.image_to_image(sketch.getvalue(), prompt="a red circle", num_inference_steps=1)
        assert picture.size == (256, 32)

    def test_image_to_image(self, client):
        sketch = io.BytesIO()
        Image.linear_gradient("L").resize((70, 50)).save(sketch, "PNG")
        pictures = [
            client.image_to_image(sketch.getvalue(), prompt="a red circle", num_inference_steps=4, seed=1, **strength)
            for strength in ({"strength": 0.0}, {"strength": 0.25}, {"strength": 1.0})
        ]
        assert {picture.size for picture in pictures} == {(64, 48)}
        assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()

    def test_photographs_are_turned_upright(self, client):
        photograph, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6  # orientation: a quarter turn
        Image.linear_gradient("L").resize((64, 32)).save(photograph, "JPEG", exif=exif)
        settings = {"prompt": "a red circle", "num_inference_steps": 1}
        payload = {"inputs": base64.b64encode(photograph.getvalue()).decode(), "parameters": settings}
        request = urllib.request.Request(
            client.model, json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        assert Image.open(urllib.request.urlopen(request)).size == (32, 64)

    def test_the_least_strength_leaves_a_step(self, client):
        """Of 49, of which the 49th part is less than 1 by rounding."""
        sketch = io.BytesIO()
        Image.linear_gradient("L").resize((16, 16)).save(sketch, "PNG")
        settings = {"prompt": "a red circle", "num_inference_steps": 49, "strength": 0.0, "seed": 1}
        assert client.image_to_image(sketch.getvalue(), **settings).size == (16, 16)

    def test_numbers_are_brought_into_range(self, client):
        # The model's pictures are of 128 pixels: at most 256, in multiples of 16.
        settings = {"num_inference_steps": -3, "seed": 0}
        assert client.text_to_image("a", height=10**6, width=1, **settings).size == (16, 256)
        assert client.text_to_image("a", height=70, width=75, **settings).size == (80, 64)
        pictures = [client.text_to_image("a", guidance_scale=scale, **settings) for scale in (20.0, 1e9)]
        assert pictures[0].tobytes() == pictures[1].tobytes()

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            ({"inputs": "a", "parameters": {"height": "high"}}, "`height` must be a number but is 'high'"),
            ({"inputs": "a", "parameters": {"seed": True}}, "`seed` must be a number but is True"),
            ({"inputs": "a", "parameters": {"height": 10**400}}, "`height` must be a number but is 1000"),
            ({"inputs": "a", "parameters": {"guidance_scale": float("inf")}}, "`guidance_scale` must be a number"),
            ({"inputs": "a", "parameters": {"negative_prompt": 1}}, "`negative_prompt` must be a text but is 1"),
            ({"inputs": "a", "parameters": {"scheduler": "DDIM"}}, "unknown parameter `scheduler`; known are prompt"),
            ({"inputs": "a", "parameters": ["steps"]}, "`parameters` must be an object"),
            ({"inputs": "a", "parameters": {"strength": 0.5}}, "`strength` needs a picture as `inputs`"),
            ({"inputs": 5}, "`inputs` must be a prompt, or a picture with `parameters.prompt`"),
            ({}, "`inputs` must be a prompt"),
            ({"inputs": "no picture", "parameters": {"prompt": "a"}}, "`inputs` must be a PNG, JPEG or WebP picture"),
            ({"inputs": "{eps}", "parameters": {"prompt": "a"}}, "`inputs` must be a PNG, JPEG or WebP picture"),
            ({"inputs": "{bomb}", "parameters": {"prompt": "a"}}, "the picture has 5000 x 5000 pixels"),
        ],
    )
    def test_bad_requests_get_a_reason(self, payload, message, client):
        content = io.BytesIO()
        if payload.get("inputs") == "{bomb}":
            Image.new("1", (5000, 5000)).save(content, "PNG")
        elif payload.get("inputs") == "{eps}":  # for which Pillow starts Ghostscript
            Image.new("L", (16, 16)).save(content, "EPS")
        if content.tell():
            payload = payload | {"inputs": base64.b64encode(content.getvalue()).decode()}
        request = urllib.request.Request(
            client.model, json.dumps(payload).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(request)
        assert answer.value.code == 400
        assert json.loads(answer.value.read())["error"].startswith(message)

    def test_the_client_sees_the_refusal(self, client):
        with pytest.raises(HfHubHTTPError, match="unknown parameter `scheduler`"):
            client.text_to_image("a", scheduler="DDIM")


class TestTemplates:
    """The client checks almost nothing of a card."""

    TAGS = {"text-to-image", "image-to-image", "diffusers", "localdit", "window-attention"}

    @pytest.fixture(params=CARDS, ids=lambda path: path.parent.name)
    def card(self, request):
        return request.param

    def metadata(self, card):
        start, front_matter, body = card.read_text().split("---\n", 2)
        assert start == ""
        return yaml.safe_load(front_matter), body

    def test_metadata(self, card):
        metadata, _ = self.metadata(card)
        allowed = {
            "license": str, "language": str, "library_name": str, "pipeline_tag": str, "tags": list, "widget": list,
            "datasets": list, "base_model": str, "base_model_relation": str,
        }  # fmt: skip
        assert {name: type(value) for name, value in metadata.items()}.items() <= allowed.items()
        assert (metadata["license"], metadata["language"]) == ("apache-2.0", "en")
        assert (metadata["library_name"], metadata["pipeline_tag"]) == ("diffusers", "text-to-image")
        assert set(metadata["tags"]) == self.TAGS
        relation = metadata.get("base_model_relation")
        assert ("base_model" in metadata) == (relation in ("adapter", "finetune", "merge", "quantized"))

    def test_widget_shows_pictures_that_are_there_and_of_that_prompt(self, card):
        metadata, body = self.metadata(card)
        assert "<Gallery />\n" in body
        for example in metadata["widget"]:
            assert example.keys() == {"text", "parameters", "output"} and isinstance(example["text"], str)
            assert example["parameters"].keys() <= {"negative_prompt", "guidance_scale"}
            assert example["output"].keys() == {"url"}
            assert re.fullmatch(r"images/[\w-]+\.png", example["output"]["url"])
            if card.parent.name == BUNDLED_MODEL.name:  # the other model's come from who has it, see `assemble`
                made_by = read_settings(BUNDLED_MODEL / example["output"]["url"])
                assert {"text": made_by["prompt"], **example["parameters"]} == {
                    "text": example["text"],
                    "negative_prompt": made_by["negative_prompt"],
                    "guidance_scale": made_by["guidance_scale"],
                }

    def test_sections(self, card):
        _, body = self.metadata(card)
        sections = re.findall(r"^## (.+)$", body, re.MULTILINE)
        assert sections == [
            "With the package", "Without the package", "Image to image", "On an endpoint", "The model", "Limitations",
            "Licence",
        ]  # fmt: skip
        assert "$model_info" in body and "DATAGRID" in body

    def test_code_serves_all_repositories(self, card):
        for name in ("requirements.txt", ".gitattributes"):
            assert (card.parent / name).read_bytes() == (CARDS[0].parent / name).read_bytes()

    def test_requirements_are_those_of_the_package(self, card):
        dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
        wanted = set(re.findall(r'^    "(.+?)"', dependencies[1], re.M))
        listed = (card.parent / "requirements.txt").read_text().split()
        assert listed == sorted(listed)
        # The endpoint brings the others.
        assert wanted - set(listed) == {line for line in wanted if line.startswith(("torch>", "huggingface_hub>"))}

    def test_configuration_is_one_of_ours(self, card):
        config = json.loads((card.parent / "transformer" / "config.json").read_text())
        if card.parent.name == "localdit-shapes":
            shipped = json.loads((BUNDLED_MODEL / "transformer" / "config.json").read_text())
            assert config.items() <= shipped.items()
        else:
            with torch.device("meta"):
                model = LocalDiTTransformer2DModel.from_config(config | {"use_global_context": False})
            assert round(model.num_parameters() / 1e6, 1) == 398.8
