"""Importing the package is all that diffusers needs to load its classes by name."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from transformer_inputs import random_inputs, tiny_transformer

import diffusers_localdit

SERVER = """
import io, json, os, sys
from contextlib import redirect_stdout
from diffusers import AutoencoderKL, DiffusionPipeline

for line in sys.stdin:
    if os.fork() == 0:
        with redirect_stdout(io.StringIO()) as output:
            exec(json.loads(line), {})
        print(json.dumps(output.getvalue()), flush=True)
        os._exit(0)
    if os.wait()[1] != 0:
        print("null", flush=True)
"""


@pytest.fixture(scope="module")
def run_python() -> Iterator[Callable[[str], str]]:
    """Runs programs in processes that have imported what is used of diffusers, and nothing of ours."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(program: str) -> str:
        server.stdin.write(json.dumps(program) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def test_import_does_not_pull_in_the_auto_pipelines(run_python):
    # They import nearly every pipeline of diffusers; nor may anything compile, plot or serve at import.
    program = """
import sys
before = set(sys.modules)
import diffusers_localdit
print("\\n".join(set(sys.modules) - before))
"""
    added = run_python(program).split()
    assert "diffusers_localdit.transformer_localdit" in added
    heavy = {"diffusers.pipelines.auto_pipeline", "torch._inductor", "triton", "peft", "gradio", "sentencepiece"}
    assert heavy.isdisjoint(added)


@pytest.mark.parametrize(
    "first, second", [("diffusers_localdit", "auto_pipeline"), ("auto_pipeline", "diffusers_localdit")]
)
def test_auto_pipelines_know_both_tasks_whichever_is_imported_first(first, second, run_python):
    imports = {
        "diffusers_localdit": "import diffusers_localdit",
        "auto_pipeline": "from diffusers import AutoPipelineForText2Image",
    }
    program = f"""
{imports[first]}
{imports[second]}
import sys
from diffusers.pipelines import auto_pipeline
print(auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["localdit"].__name__)
print(auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["localdit"].__name__)
print([finder for finder in sys.meta_path if type(finder).__name__ == "AutoPipelineFinder"])
"""
    assert run_python(program).split() == ["LocalDiTPipeline", "LocalDiTImg2ImgPipeline", "[]"]


def test_classes_are_attributes_of_diffusers():
    for name in set(diffusers_localdit.__all__) - {"BUNDLED_MODEL"}:
        assert getattr(diffusers, name) is getattr(diffusers.pipelines, name) is getattr(diffusers_localdit, name)


def test_auto_model_finds_the_installed_class(tmp_path):
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "transformer")
    loaded = AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(loaded) is diffusers_localdit.LocalDiTTransformer2DModel
    with torch.no_grad():
        assert torch.equal(loaded(**random_inputs()).sample, model(**random_inputs()).sample)


def test_a_saved_pipeline_names_the_package_and_resolves_to_it(tmp_path):
    pipe = diffusers_localdit.LocalDiTPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=tiny_transformer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LocalDiTPipeline"
    assert index["transformer"] == ["diffusers_localdit", "LocalDiTTransformer2DModel"]

    loaded = DiffusionPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    assert type(loaded) is diffusers_localdit.LocalDiTPipeline
    assert type(loaded.transformer) is diffusers_localdit.LocalDiTTransformer2DModel
