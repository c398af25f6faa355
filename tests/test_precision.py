"""Computing in int8: the sums are exact, the errors those of rounding, and the bundled model draws the same."""

import copy
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.precision import (
    TOKEN_LIMIT,
    WEIGHT_LIMIT,
    Int8Linear,
    fast_dtype,
    quantize_int8,
    why_not_int8,
)

needs_int8 = pytest.mark.skipif(
    why_not_int8(torch.device("cpu")) is not None, reason=str(why_not_int8(torch.device("cpu")))
)


def psnr(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Of one picture in dB, the peak being the range of the reference."""
    error = (latents - reference).square().mean()
    return (10 * torch.log10((reference.max() - reference.min()).square() / error)).item()


@needs_int8
class TestInt8Linear:
    @pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 1, 1), (3, 7, 5), (130, 145, 24), (64, 1152, 96)])
    @pytest.mark.parametrize("extreme", [False, True])
    def test_sums_are_exact(self, tokens, inputs, outputs, extreme):
        """Also where all addends are as large as they come, which cuts off a sum in 16 bits of larger weights."""
        generator = torch.Generator().manual_seed(tokens)
        whole = torch.randint(-TOKEN_LIMIT, TOKEN_LIMIT + 1, (tokens, inputs), generator=generator)
        weight = torch.randint(-WEIGHT_LIMIT, WEIGHT_LIMIT + 1, (outputs, inputs), generator=generator)
        if extreme:
            whole, weight = whole.sign() * TOKEN_LIMIT, weight.sign() * WEIGHT_LIMIT
            whole[0], weight[0] = TOKEN_LIMIT, WEIGHT_LIMIT
        whole[:, 0], weight[:, 0] = TOKEN_LIMIT, WEIGHT_LIMIT  # the largest of a row sets its scale, here to 1
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = weight.float()
        assert torch.equal(Int8Linear(linear)(whole.float()), (whole @ weight.T).float())

    @given(
        inputs=st.integers(1, 40),
        outputs=st.integers(1, 20),
        magnitude=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=25)
    def test_error_is_that_of_rounding(self, inputs, outputs, magnitude, seed):
        generator = torch.Generator().manual_seed(seed)
        linear = nn.Linear(inputs, outputs).double()
        tokens = magnitude * torch.randn(6, inputs, generator=generator, dtype=torch.float64)
        expected = linear(tokens)
        token_step = tokens.abs().amax(dim=1, keepdim=True) / TOKEN_LIMIT
        weight_step = linear.weight.abs().amax(dim=1) / WEIGHT_LIMIT
        bound = (
            tokens.abs().sum(dim=1, keepdim=True) * weight_step / 2
            + token_step / 2 * linear.weight.abs().sum(dim=1)
            + inputs * token_step * weight_step / 4
        )
        output = Int8Linear(linear.float())(tokens.float())
        assert ((output - expected).abs() <= bound * 1.001 + 1e-6 * expected.abs() + 1e-37).all()

    def test_zeros_give_the_bias_and_nan_stays_in_its_token(self):
        linear = nn.Linear(16, 8)
        tokens = torch.randn(1, 5, 16)
        expected = Int8Linear(linear)(tokens)
        tokens[0, 1], tokens[0, 2, 3], tokens[0, 3, 3] = 0, float("nan"), float("inf")
        output = Int8Linear(linear)(tokens)
        assert torch.equal(output[0, 1], linear.bias)
        assert output[0, 2].isnan().all() and not output[0, 3].isfinite().any()
        assert torch.equal(output[0, [0, 4]], expected[0, [0, 4]])

    def test_zero_weights_and_no_tokens(self):
        linear = nn.Linear(4, 3)
        nn.init.zeros_(linear.weight)
        layer = Int8Linear(linear)
        assert torch.equal(layer(torch.randn(2, 4)), linear.bias.expand(2, 3))
        assert layer(torch.randn(2, 0, 4)).shape == (2, 0, 3)

    def test_products_are_optimised_ones(self):
        """oneDNN's reference loop gives the same numbers, thousands of times later."""
        program = """
import ctypes, os, sys, torch
from diffusers_localdit.precision import Int8Linear
for instructions in sys.argv[1:]:  # each in a process of its own, forked before oneDNN chooses
    if os.fork() == 0:
        os.environ["ONEDNN_MAX_CPU_ISA"] = instructions
        Int8Linear(torch.nn.Linear(145, 96))(torch.randn(130, 145))
        ctypes.CDLL(None).fflush(None)
        os._exit(0)
    assert os.wait()[1] == 0
"""
        command = [sys.executable, "-c", program, "DEFAULT", "AVX512_CORE_VNNI", "AVX2"]
        environment = os.environ | {"ONEDNN_VERBOSE": "1"}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        *_, chosen = re.findall(r"info,cpu,isa:(.+)", printed)
        assert chosen == "Intel AVX2" or platform.machine() != "x86_64"
        implementations = re.findall(r"exec,cpu,matmul,([^,]+),", printed)
        assert len(implementations) == 3 and not any("ref" in name for name in implementations)

    def test_gradients_are_refused(self):
        with pytest.raises(ValueError, match="without gradients"):
            Int8Linear(nn.Linear(4, 3))(torch.randn(2, 4, requires_grad=True))


@needs_int8
class TestQuantizedModel:
    @pytest.fixture(scope="class")
    def pipe(self):
        pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @staticmethod
    def forward(transformer):
        generator = torch.Generator().manual_seed(0)
        config = transformer.config
        with torch.no_grad():
            return transformer(
                torch.randn(2, config.in_channels, 12, 20, generator=generator).to(transformer.dtype),
                torch.randn(2, 9, config.caption_channels, generator=generator).to(transformer.dtype),
                torch.tensor([3, 700]),
                {"resolution": torch.tensor([[96.0, 160.0]] * 2), "aspect_ratio": torch.tensor([[5 / 3]] * 2)},
            ).sample

    def test_draws_the_same(self, pipe):
        """
        The project's figure: at least 35 dB on final latents, each picture by itself. As in `benchmarks/int8.py` with
        the released LocalDiT's sampler: the noise of the bundled model's own leads pictures astray more easily.
        """
        prompts = [  # whole captions: where no background is named, small differences may change the picture
            "a red circle on a white background",
            "a blue square left of a green triangle on a grey background",
            "two red squares on a black background",
        ]

        def draw() -> torch.Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
            return pipe(prompts, guidance_scale=1.5, generator=generators, output_type="latent").images

        expected, transformer = draw(), pipe.transformer
        pipe.transformer = quantize_int8(copy.deepcopy(transformer))
        figures = [psnr(*pair) for pair in zip(draw(), expected)]
        pipe.transformer = transformer
        assert min(figures) >= 35 and max(figures) < 90, figures  # more would mean that nothing was rounded

    def test_all_linear_layers_of_the_blocks(self, pipe):
        transformer = quantize_int8(copy.deepcopy(pipe.transformer))
        kinds = {type(module) for module in transformer.transformer_blocks.modules()}
        assert Int8Linear in kinds and nn.Linear not in kinds
        assert type(transformer.proj_out) is nn.Linear
        again = self.forward(transformer)
        assert torch.equal(self.forward(quantize_int8(transformer)), again)  # nothing left to do

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saved_and_loaded_it_computes_the_same(self, dtype, pipe, tmp_path):
        transformer = quantize_int8(copy.deepcopy(pipe.transformer).to(dtype))
        expected = self.forward(transformer)
        assert expected.dtype == dtype
        transformer.save_pretrained(tmp_path)
        loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(self.forward(quantize_int8(loaded)), expected)

    def test_with_fused_projections(self, pipe):
        transformer = copy.deepcopy(pipe.transformer)
        transformer.fuse_qkv_projections()
        fused = self.forward(quantize_int8(transformer))
        assert torch.allclose(fused, self.forward(quantize_int8(copy.deepcopy(pipe.transformer))), atol=1e-5)

    def test_lora_is_refused(self, pipe):
        peft = pytest.importorskip("peft")
        transformer = copy.deepcopy(pipe.transformer)
        transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match="fuse_lora"):
            quantize_int8(transformer)

    def test_elsewhere_it_says_why_not(self, pipe, monkeypatch):
        with pytest.raises(ValueError, match="the device is meta; there, quantize with diffusers' TorchAoConfig"):
            quantize_int8(copy.deepcopy(pipe.transformer).to("meta"))
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        with pytest.raises(ValueError, match="needs an x86-64 processor"):
            quantize_int8(pipe.transformer)


@pytest.mark.parametrize(
    ("device", "instructions", "expected"),
    [
        ("cpu", {"avx2": True}, torch.float32),
        ("cpu", {"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cuda", {}, torch.bfloat16),
        ("mps", {"avx512_bf16": True}, torch.float32),
    ],
)
def test_dtype_that_a_device_is_good_at(device, instructions, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert fast_dtype(torch.device(device)) == expected
