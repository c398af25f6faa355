"""
What is computed on a GPU, and what comes there and leaves again, against the CPU. test_gpu.py runs these in processes
of their own: on an emulated GPU, and on a GPU where there is one.
"""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.state import AcceleratorState
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipeline_fixtures import SENTENCES, make_components
from training_inputs import arguments, own_process_as_before, rows, write_shard  # noqa: F401
from transformer_inputs import in_dtype, map_tensors, random_inputs, relative_error, tiny_transformer

from diffusers_localdit import (
    BUNDLED_MODEL,
    LocalDiTImg2ImgPipeline,
    LocalDiTPipeline,
    loading,
    transformer_localdit,
)
from diffusers_localdit.cli import main
from diffusers_localdit.training.models import use_kernels
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.transformer_localdit import LocalDiTWindowAttnProcessor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("float32_is_float32"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
# What an emulated GPU cannot run is left to PyTorch, which is said.
KERNELS_RUN = torch.backends.cuda.is_built() or os.environ.get("TRITON_INTERPRET") == "1"
SLOWER = "PyTorch computes the self-attention, which takes longer. The kernels do not run here: "


def on(device: str | torch.device, inputs: dict) -> dict:
    return map_tensors(lambda tensor: tensor.to(device), inputs)


# The transformer


@pytest.mark.parametrize("place", ["there", "block_level", "leaf_level", "leaf_level, ahead", "layers", "split"])
@pytest.mark.parametrize("use_global_context", [True, False], ids=["global", "folded"])
@pytest.mark.parametrize("slabs", [False, True], ids=["whole", "slabs"])
@torch.no_grad()
def test_weights_come_when_they_are_needed(place, use_global_context, slabs, tmp_path, monkeypatch):
    model, inputs = tiny_transformer(num_layers=3, use_global_context=use_global_context), random_inputs(14, 10)
    expected = model(**inputs).sample
    match place:
        case "there":
            model.to(CUDA)
        case "layers":
            cpu_offload(model, execution_device=CUDA)
        case "split":
            model.save_pretrained(tmp_path)
            memory = {0: model.get_memory_footprint() // 2, "cpu": model.get_memory_footprint()}
            model = type(model).from_pretrained(tmp_path, device_map="auto", max_memory=memory)
            assert set(model.hf_device_map.values()) == {0, "cpu"}
        case "leaf_level, ahead":
            model.enable_group_offload(CUDA, offload_type="leaf_level", use_stream=True)
        case offload_type:
            model.enable_group_offload(CUDA, offload_type=offload_type, num_blocks_per_group=1)
    if slabs:
        monkeypatch.setattr(transformer_localdit, "GPU_SLAB_NUMBERS", 4 * 24 * 16)
    step_cache = model.make_step_cache()
    for _ in range(3):
        sample = model(**on(CUDA, inputs), step_cache=step_cache).sample
        assert sample.is_cuda
        assert relative_error(sample.cpu(), expected) < 1e-5


@pytest.mark.parametrize("use_global_context", [True, False], ids=["global", "folded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(use_global_context, checkpointing):
    """Of so many tokens that cross-attention takes them in parts."""
    model, inputs = tiny_transformer(num_layers=2, use_global_context=use_global_context), random_inputs(64, 64)
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        if checkpointing and device == "cuda":
            model.enable_gradient_checkpointing()
        model(**on(device, inputs)).sample.square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()]))
    assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision(dtype):
    """Where the GELU is part of a product."""
    model, inputs = tiny_transformer(), random_inputs()
    expected = model(**inputs).sample
    sample = model.to(CUDA, dtype)(**on(CUDA, in_dtype(dtype, inputs))).sample
    assert relative_error(sample.cpu(), expected) < {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


# Pipelines


def draw(pipe: LocalDiTPipeline | LocalDiTImg2ImgPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    colours = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    start = {"height": 64, "width": 64}
    if isinstance(pipe, LocalDiTImg2ImgPipeline):
        start = {"image": Image.fromarray(colours), "strength": 1.0}
    generator = torch.Generator().manual_seed(0)
    return pipe(SENTENCES[0], num_inference_steps=2, generator=generator, output_type="pt", **start).images.cpu()


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    return make_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="module", params=[LocalDiTPipeline, LocalDiTImg2ImgPipeline])
def make_pipeline(request, components):
    def make():
        models = {name: copy.deepcopy(components[name]) for name in ("text_encoder", "vae", "transformer")}
        return request.param(**components | models)

    return make


@pytest.fixture(scope="module")
def expected(make_pipeline, tmp_path_factory):
    """What the CPU draws without LoRA and with it, and its folder."""
    pipe, folder = make_pipeline(), tmp_path_factory.mktemp("lora")
    plain = draw(pipe)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"]))
    pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return plain, draw(pipe), folder


OFFLOADS = {
    "none": lambda pipe: pipe.to(CUDA),
    "models": lambda pipe: pipe.enable_model_cpu_offload(),
    "layers": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "groups of blocks": lambda pipe: pipe.enable_group_offload(CUDA, num_blocks_per_group=1),
    "groups of layers": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="leaf_level"),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_pipelines_draw_the_same_picture(offload, make_pipeline, expected):
    """With LoRA that is there before offloading, without, and with LoRA that comes after."""
    plain, adapted, lora = expected
    assert relative_error(adapted, plain) > 1e-3
    pipe = make_pipeline()
    pipe.load_lora_weights(lora)
    OFFLOADS[offload](pipe)
    assert relative_error(draw(pipe), adapted) < 1e-5
    pipe.unload_lora_weights()
    assert relative_error(draw(pipe), plain) < 1e-5
    pipe.load_lora_weights(lora)
    assert relative_error(draw(pipe), adapted) < 1e-5
    if offload == "models":
        assert {pipe.transformer.device.type, pipe.text_encoder.device.type} == {"cpu"}


@pytest.mark.parametrize(
    "offload, dtype, tried",
    [
        ("none", "bfloat16", True),
        ("model", "float16", True),
        ("group", "bfloat16", False),
        ("sequential", "bfloat16", False),
        ("none", "float32", False),
    ],
)
def test_kernels_are_the_default(offload, dtype, tried, monkeypatch, caplog):
    monkeypatch.setattr(loading.logger, "propagate", True)
    settings = {"model": str(BUNDLED_MODEL), "dtype": dtype, "device": "cuda"}
    pipe = loading.load_pipeline(LocalDiTPipeline, settings, offload)
    processors = {type(block.attn.processor).__name__ for block in pipe.transformer.transformer_blocks}
    assert processors == {"LocalDiTTritonAttnProcessor" if tried and KERNELS_RUN else "LocalDiTWindowAttnProcessor"}
    assert (SLOWER in caplog.text) == (tried and not KERNELS_RUN)
    assert draw(pipe).isfinite().all()


# Training


def train(device: str, data: Path, output: Path, **settings) -> list[dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(device == "cpu"))
        assert main(["train", *arguments(data, output, **settings)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return rows(output)


def assert_same_losses(metrics: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    assert [row["step"] for row in metrics] == [row["step"] for row in expected]
    losses = [
        (row[name], expected_row[name])
        for row, expected_row in zip(metrics, expected)
        for name in ("loss", "validation_loss")
        if name in expected_row
    ]
    assert relative_error(*torch.tensor(losses).T) < tolerance


@pytest.mark.usefixtures("own_process_as_before")
class TestTraining:
    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory):
        return write_shard(tmp_path_factory.mktemp("training") / "data")

    @pytest.fixture(scope="class")
    def on_the_cpu(self, data):
        return train("cpu", data, data.parent / "cpu")

    @pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
    def test_half_precision(self, mixed_precision, data, on_the_cpu, tmp_path, capsys):
        """With the kernels where they run."""
        metrics = train("cuda", data, tmp_path / "run", mixed_precision=mixed_precision)
        assert_same_losses(metrics, on_the_cpu, 1e-3)
        said = "the Triton kernels compute the self-attention" if KERNELS_RUN else SLOWER
        assert said in capsys.readouterr().out

    @pytest.mark.parametrize("settings", [{"kernels": False}, {"mixed_precision": "no"}])
    def test_kernels_are_not_tried(self, settings):
        transformer = tiny_transformer(num_layers=1)
        assert use_kernels(transformer, TrainingSettings(**settings), CUDA) is None
        assert type(transformer.transformer_blocks[0].attn.processor) is LocalDiTWindowAttnProcessor

    def test_runs_go_on_elsewhere(self, data, on_the_cpu, tmp_path):
        for device, steps in (("cuda", 3), ("cpu", 5), ("cuda", 8)):
            metrics = train(device, data, tmp_path / "run", steps=steps)
        assert_same_losses(metrics, on_the_cpu, 1e-5)

    def test_pictures_are_encoded_there(self, components, tmp_path):
        LocalDiTPipeline(**components).save_pretrained(tmp_path / "pipeline")
        data = tmp_path / "data"
        data.mkdir()
        for i in range(6):
            colours = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(colours).save(data / f"{i}.png")
            (data / f"{i}.txt").write_text(SENTENCES[i])
        architecture = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": 32}
        settings = {"pipeline": tmp_path / "pipeline", "architecture": json.dumps(architecture), "steps": 2}
        runs, pictures = [], []
        for device in ("cpu", "cuda"):
            runs.append(train(device, data, tmp_path / device, validation_prompts=SENTENCES[0], **settings))
            pictures.append(np.asarray(Image.open(tmp_path / device / "samples" / "step_00000002.png"), dtype=int))
        assert_same_losses(*reversed(runs), 1e-5)
        assert np.ptp(pictures[0]) > 50 and abs(pictures[1] - pictures[0]).max() <= 1
