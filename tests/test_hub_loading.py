"""Every way in which people load a repository, from the loopback Hub and from a folder, in processes of their own."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_clients import (
    ROOT,
    assemble_tiny,
    code_blocks,
    environment_without_package,
    evaluate,
    save_tiny_pipeline,
    template_for_tiny,
)
from loopback_hub import TOKEN
from PIL import Image
from safetensors.torch import load_file

from diffusers_localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline, hub
from diffusers_localdit.conversion import convert_checkpoint, load_original
from diffusers_localdit.hub_latents import sample

ORIGINAL = ROOT / "tests" / "golden" / "window4_global" / "original_with_processor.pt"
SOURCES = {"id": "owner/tiny", "folder": "{folder}"}

# By what is sampled and with which model; `source` is a repository id or a folder.
WITH_PACKAGE = {
    "text own class": "LocalDiTPipeline.from_pretrained(source)",
    "text base class": "DiffusionPipeline.from_pretrained(source)",
    "text auto class": "AutoPipelineForText2Image.from_pretrained(source)",
    "text auto model": "LocalDiTPipeline.from_pretrained(source, transformer=AutoModel.from_pretrained(source, "
    "subfolder='transformer'))",
    "text from_pipe": "LocalDiTPipeline.from_pipe(LocalDiTImg2ImgPipeline.from_pretrained(source))",
    "image own class": "LocalDiTImg2ImgPipeline.from_pretrained(source)",
    "image auto class": "AutoPipelineForImage2Image.from_pretrained(source)",
    "image from_pipe": "LocalDiTImg2ImgPipeline.from_pipe(LocalDiTPipeline.from_pretrained(source))",
    "image auto from_pipe": "AutoPipelineForImage2Image.from_pipe(AutoPipelineForText2Image.from_pretrained(source))",
    "text variant": "LocalDiTPipeline.from_pretrained(source, variant='bf16')",
    "text from_pipe bfloat16": "from_pipe_keeps(LocalDiTPipeline, LocalDiTImg2ImgPipeline, source)",
}
BY_REVISION = {
    f"text {kind}": f"LocalDiTPipeline.from_pretrained('owner/tiny', revision={revision!r})"
    for kind, revision in {"old branch": "old", "old tag": "v0", "old commit": "{old_commit}"}.items()
}
PUSHED = {
    "text pushed": "LocalDiTPipeline.from_pretrained('owner/pushed')",
    "text pushed base class": "DiffusionPipeline.from_pretrained('owner/pushed')",
    "image pushed": "LocalDiTImg2ImgPipeline.from_pretrained('owner/pushed')",
    "text pushed by remote code": "LocalDiTPipeline.from_pretrained('owner/pushed-remote')",
    "image pushed by remote code": "LocalDiTImg2ImgPipeline.from_pretrained('owner/pushed-remote')",
}
REMOTE = "trust_remote_code=True"
IMAGE_CLASS = f"get_class_from_dynamic_module(source, 'pipeline_localdit_img2img.py', {REMOTE})"
WITHOUT_PACKAGE = {
    "text": f"DiffusionPipeline.from_pretrained(source, custom_pipeline=source, {REMOTE})",
    "image": f"DiffusionPipeline.from_pretrained(source, custom_pipeline='pipeline_localdit_img2img', {REMOTE})",
    "image from_pipe": f"{IMAGE_CLASS}.from_pipe(DiffusionPipeline.from_pretrained(source, custom_pipeline=source, "
    f"{REMOTE}))",
    "text from_pipe bfloat16": f"from_pipe_keeps(DiffusionPipeline, {IMAGE_CLASS}, source, custom_pipeline=source, "
    f"{REMOTE})",
    "text variant": f"DiffusionPipeline.from_pretrained(source, custom_pipeline=source, variant='bf16', {REMOTE})",
}
WITHOUT_TRUST = {
    "text": "DiffusionPipeline.from_pretrained(source, custom_pipeline=source)",
    "image": "DiffusionPipeline.from_pretrained(source, custom_pipeline='pipeline_localdit_img2img')",
}
PRELUDE = """
def from_pipe_keeps(text_class, image_class, source, **options):
    text = text_class.from_pretrained(source, dtype=torch.bfloat16, **options)
    image = image_class.from_pipe(text)
    assert image.transformer is text.transformer and image.vae is text.vae
    assert {module.dtype for module in (text.transformer, text.vae, text.text_encoder)} == {torch.bfloat16}
    return text

def save_and_push(pipe, repository):
    pipe.save_pretrained(repository.split("/")[1], push_to_hub=True, repo_id=repository)
    return pipe

def weights(model):
    return torch.cat([parameter.flatten() for _, parameter in sorted(model.state_dict().items())])

def picture_of(code):
    names = {}
    exec(code, names)
    return torch.tensor([names["image"].height, names["image"].width])
"""
IMPORTS = """
from diffusers_localdit import LocalDiTImg2ImgPipeline, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.cli import main
"""


def over_sources(expressions: dict[str, str], folder: Path) -> dict[str, str]:
    return {
        f"{name}, {kind}": re.sub(r"\bsource\b", repr(source.format(folder=folder)), expression)
        for name, expression in expressions.items()
        for kind, source in SOURCES.items()
    }


def quick(block: str) -> str:
    for slow, fast in {"num_inference_steps=20": "num_inference_steps=2", "768": "64", "1024,": "96,"}.items():
        block = block.replace(slow, fast)
    return block


@pytest.fixture(scope="module")
def world(loopback_hub, tmp_path_factory):
    """A Hub with repositories whose code leaves a trace when it runs, and the results of all clients."""
    tmp = tmp_path_factory.mktemp("loading")
    model = save_tiny_pipeline(tmp)
    folder = assemble_tiny(model, tmp / "repository", variants=["bf16"])
    for path in folder.rglob("*.py"):
        with path.open("a") as code:
            code.write("\nimport os\nopen(os.environ['TRACE'], 'a').write(__name__ + chr(10))\n")
    old = Path(shutil.copytree(folder, tmp / "old"))
    scheduler = json.loads((old / "scheduler" / "scheduler_config.json").read_text())
    (old / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"use_karras_sigmas": True}))
    cards = {}
    for name in ("localdit-shapes", "LocalDiT-1024"):
        hub.assemble(model, tmp / name, f"owner/{name}", template_for_tiny(name, tmp / "templates"))
        cards[name] = code_blocks((tmp / name / "README.md").read_text())
    Image.linear_gradient("L").resize((96, 64)).save(tmp / "sketch.png")

    server = loopback_hub.emptied()
    old_commit = server.add("owner/tiny", old)
    repository = server.repositories["owner/tiny"]
    repository.branches["old"] = repository.tags["v0"] = old_commit
    server.add("owner/tiny", folder)
    server.add("owner/original", {"models/LocalDiT.pt": ORIGINAL.read_bytes()})
    for name in cards:
        server.add(f"owner/{name}", tmp / name)

    def client(home, trace, **options):
        environment = server.environment(tmp / home, token=TOKEN) | {"TRACE": str(tmp / trace)}
        return environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | options

    blocks = {True: {}, False: {}}  # by whether they need the package
    for name, card in cards.items():
        for i, block in enumerate(card):
            blocks["diffusers_localdit" in block][f"card {name} {i}"] = f"picture_of({quick(block)!r})"
    python = environment_without_package(tmp / "venv")
    remote = over_sources(WITHOUT_PACKAGE, folder)
    absent = evaluate(
        remote
        | {f"refused {name}": code for name, code in over_sources(WITHOUT_TRUST, folder).items()}
        | {"text push": f"save_and_push({remote['text, id']}, 'owner/pushed-remote')"}
        | blocks[False],
        client("home-absent", "trace-absent"),
        tmp,
        PRELUDE,
        python,
    )
    hosted = "https://huggingface.co/owner/original/blob/main/models/LocalDiT.pt"
    installed = evaluate(
        over_sources(WITH_PACKAGE, folder)
        | {name: code.format(old_commit=old_commit) for name, code in BY_REVISION.items()}
        | {"text push": "save_and_push(LocalDiTPipeline.from_pretrained('owner/tiny'), 'owner/pushed')"}
        | PUSHED
        | {"single file": f"weights(LocalDiTTransformer2DModel.from_single_file('{hosted}', sample_size=128))"}
        | {"convert": "torch.tensor(main(['convert', 'hf://owner/original/models/LocalDiT.pt', 'converted']))"}
        | blocks[True],
        client("home", "trace"),
        tmp,
        PRELUDE + IMPORTS,
    )
    offline = evaluate(
        {name: code for name, code in over_sources(WITH_PACKAGE, folder).items() if name.endswith("id")}
        | {name: code.format(old_commit=old_commit) for name, code in BY_REVISION.items()},
        client("home", "trace", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9"),
        tmp,
        PRELUDE + IMPORTS,
    )
    return SimpleNamespace(
        tmp=tmp, model=model, folder=folder, old=old, blocks=blocks,
        installed=installed, absent=absent, offline=offline,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected(world):
    """Latents of the folder that was published, by what and which model."""

    def quiet(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe

    text = quiet(LocalDiTPipeline.from_pretrained(world.model))
    return {
        "text": sample(text),
        "image": sample(quiet(LocalDiTImg2ImgPipeline.from_pipe(text))),
        "text variant": sample(quiet(LocalDiTPipeline.from_pretrained(world.folder, variant="bf16"))),
        "text old": sample(quiet(LocalDiTPipeline.from_pretrained(world.old))),
        "text from_pipe bfloat16": sample(quiet(LocalDiTPipeline.from_pretrained(world.model, dtype=torch.bfloat16))),
    }


def check(results, name, expected):
    latents, errors = results
    assert name not in errors, errors[name]
    wanted = max((key for key in expected if name.startswith(key)), key=len)
    assert torch.equal(latents[name], expected[wanted])


def test_the_models_differ(expected):
    """Else nothing below would show which one was loaded."""
    latents = [tensor.float() for tensor in expected.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(latents) for b in latents[:i])


@pytest.mark.parametrize("name", [f"{name}, {kind}" for name in WITH_PACKAGE for kind in SOURCES])
def test_with_package(name, world, expected):
    check(world.installed, name, expected)


@pytest.mark.parametrize("name", BY_REVISION)
def test_by_revision(name, world, expected):
    check(world.installed, name, expected)


@pytest.mark.parametrize("name", PUSHED)
def test_pushed(name, world, expected):
    check(world.installed, name, expected)


@pytest.mark.parametrize("name", [*(f"{name}, id" for name in WITH_PACKAGE), *BY_REVISION])
def test_offline_from_the_cache(name, world, expected):
    check(world.offline, name, expected)


@pytest.mark.parametrize("name", [f"{name}, {kind}" for name in WITHOUT_PACKAGE for kind in SOURCES])
def test_without_package(name, world, expected):
    check(world.absent, name, expected)


@pytest.mark.parametrize("name", [f"refused {name}, {kind}" for name in WITHOUT_TRUST for kind in SOURCES])
def test_without_package_and_without_trust(name, world):
    _, errors = world.absent
    assert errors[name].startswith("ValueError: ")
    assert "contains custom code" in errors[name] and "Pass `trust_remote_code=True`" in errors[name]


def test_only_trust_lets_code_of_the_repository_run(world):
    assert not (world.tmp / "trace").exists()
    traces = (world.tmp / "trace-absent").read_text().split()
    files = {name.rpartition(".")[2] for name in traces}
    assert {"pipeline", "pipeline_localdit_img2img", "diffusers_localdit"} <= files


def test_hosted_original_as_a_single_file(world):
    latents, errors = world.installed
    assert "single file" not in errors, errors["single file"]
    state_dict = load_original(ORIGINAL, sample_size=128).state_dict()
    weights = torch.cat([parameter.flatten() for _, parameter in sorted(state_dict.items())])
    assert torch.equal(latents["single file"], weights)


def test_conversion_of_a_hosted_file(world, tmp_path):
    latents, errors = world.installed
    assert "convert" not in errors, errors["convert"]
    assert latents["convert"].item() == 0
    convert_checkpoint(ORIGINAL, tmp_path / "converted")
    name = "transformer/diffusion_pytorch_model.safetensors"
    found, wanted = load_file(world.tmp / "converted" / name), load_file(tmp_path / "converted" / name)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_code_in_the_cards_runs(world):
    assert len(world.blocks[True]) == 6 and len(world.blocks[False]) == 4
    for blocks, (sizes, errors) in ((world.blocks[True], world.installed), (world.blocks[False], world.absent)):
        for name in blocks:
            assert name not in errors, errors[name]
            assert sizes[name].tolist() in ([128, 128], [64, 96])
