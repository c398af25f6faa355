"""The Space: its card, and that what is uploaded as its card says serves the demo."""

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_clients import ROOT, TEMPLATES, environment_without_package
from loopback_hub import TOKEN
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio (extra demo)")
from demo_server import ask, download, free_port, serving

SPACE = TEMPLATES / "space"
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_card():
    start, front_matter, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front_matter)
    assert start == "" and metadata.keys() == {
        "title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file",
        "short_description", "models", "license",
    }  # fmt: skip
    assert metadata["sdk"] == "gradio"
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"gradio=={metadata['sdk_version']}" in pins
    assert {metadata["colorFrom"], metadata["colorTo"]} <= COLOURS
    assert len(metadata["short_description"]) <= 60
    assert (SPACE / metadata["app_file"]).is_file()
    assert re.fullmatch(r"3\.\d+", metadata["python_version"])


def test_requirements_are_those_of_the_package():
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert (SPACE / "requirements.txt").read_text().split() == sorted(
        re.findall(r'^    "(.+?)"', dependencies[1], re.M)
    )


def test_uploaded_as_the_card_says_it_serves_the_demo(loopback_hub, tmp_path):
    (commands,) = re.findall(r"```bash\n(.*?)```", (SPACE / "README.md").read_text(), re.DOTALL)
    hub = loopback_hub.emptied()
    environment = hub.environment(tmp_path / "home", TOKEN)
    for command in commands.splitlines():
        arguments = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)[1:]]
        done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
    files = hub.repositories["spaces/owner/localdit"].find("main").files
    assert not any("__pycache__" in name for name in files)
    for name in files:
        target = tmp_path / "space" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(hub.read("spaces/owner/localdit", name))

    python = environment_without_package(tmp_path / "venv")
    port = {"GRADIO_SERVER_PORT": str(free_port()), "GRADIO_NUM_PORTS": "1"}
    with serving([str(python), "app.py"], tmp_path / "space", **port) as server:
        settings = ["a red circle on a white background", "", 64, 48, 2, 1.5, 5, False]
        name, (_, _, picture, *_) = ask(server.address, "text_to_image", *settings)
        assert name == "complete"
        assert Image.open(io.BytesIO(download(server.address, picture["value"]))).size == (64, 48)
