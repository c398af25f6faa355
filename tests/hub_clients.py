"""Repositories to publish, and processes that load them as users do."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch
from pipeline_fixtures import make_components
from safetensors.torch import load_file

from diffusers_localdit import LocalDiTPipeline, hub

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "hub_configs"

# Evaluates expressions by name, and writes the tensor that each gives or, if it is a pipeline, the latents it samples.
PROGRAM = """
import json, runpy, sys
from pathlib import Path
import torch
from diffusers import AutoModel, AutoPipelineForImage2Image, AutoPipelineForText2Image, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors.torch import save_file

latents_source, output, prelude = sys.argv[1:]
sample = runpy.run_path(latents_source)["sample"]
exec(prelude)
results, errors = {}, {}
for name, expression in json.load(sys.stdin).items():
    try:
        result = eval(expression)
        results[name] = result if isinstance(result, torch.Tensor) else sample(result)
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
save_file(results, output)
print(json.dumps(errors))
"""


def save_tiny_pipeline(folder: Path) -> Path:
    LocalDiTPipeline(**make_components(folder)).save_pretrained(folder / "tiny")
    return folder / "tiny"


def template_for_tiny(name: str, folder: Path) -> Path:
    """What is ours of a repository, without the JSON files, since these say that the model is another one."""
    return Path(shutil.copytree(TEMPLATES / name, folder / name, ignore=shutil.ignore_patterns("*.json")))


def assemble_tiny(model: Path, output: Path, **options) -> Path:
    template = template_for_tiny("localdit-shapes", output.with_name(f"{output.name}-template"))
    hub.assemble(model, output, "owner/tiny", template, **options)
    return output


def environment_without_package(folder: Path) -> Path:
    """
    The Python of a virtual environment with all that is installed here but the package.

    The folder of this environment is on its path, but not the `.pth` files in it, one of which leads to the package.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    Path(own, "others.pth").write_text(sysconfig.get_path("purelib"))
    check = "import importlib.util; print(importlib.util.find_spec('diffusers_localdit'))"
    found = subprocess.run([python, "-c", check], capture_output=True, text=True, check=True, cwd=folder).stdout
    assert found == "None\n"
    return python


def evaluate(
    expressions: dict[str, str],
    environment: dict[str, str],
    folder: Path,
    prelude: str = "",
    python: Path = Path(sys.executable),
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors that the expressions give in a process of its own, run in `folder`, and the errors of the others."""
    source = ROOT / "src" / "diffusers_localdit" / "hub_latents.py"
    output = folder / "results.safetensors"
    command = [str(python), "-c", PROGRAM, str(source), str(output), prelude]
    process = subprocess.run(
        command, env=environment, cwd=folder, input=json.dumps(expressions), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return load_file(output), json.loads(process.stdout.splitlines()[-1])


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)
