"""Weights laid out once: the same linear, the same state dict, and no call that lays them out again."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_localdit import BUNDLED_MODEL, LocalDiTTransformer2DModel, transformer_localdit
from diffusers_localdit.loading import load_pipeline
from diffusers_localdit.packed_linear import PackedGELU, PackedLinear, pack_linears, why_not_packed
from diffusers_localdit.pipeline_localdit import LocalDiTPipeline
from diffusers_localdit.precision import Int8Linear, quantize_int8, why_not_int8

CPU = torch.device("cpu")
needs_packing = pytest.mark.skipif(
    why_not_packed(CPU, torch.float32) is not None, reason=str(why_not_packed(CPU, torch.float32))
)
HALF_STEP = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
dtypes = st.sampled_from(list(HALF_STEP))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
needs_int8 = pytest.mark.skipif(why_not_int8(CPU) is not None, reason=str(why_not_int8(CPU)))
all_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(PackedLinear, marks=needs_packing), pytest.param(Int8Linear, marks=needs_int8)]
)


def load(**options) -> LocalDiTTransformer2DModel:
    return LocalDiTTransformer2DModel.from_pretrained(BUNDLED_MODEL, subfolder="transformer", **options)


@torch.no_grad()
def forward(transformer: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    channels, captions = transformer.config.in_channels, transformer.config.caption_channels
    return transformer(
        torch.randn(2, channels, 12, 20, generator=generator).to(transformer.dtype),
        torch.randn(2, 9, captions, generator=generator).to(transformer.dtype),
        timestep=torch.tensor([3, 700]),
        added_cond_kwargs={
            "resolution": torch.tensor([[96.0, 160.0]] * 2),
            "aspect_ratio": torch.tensor([[5 / 3]] * 2),
        },
    ).sample


@needs_packing
class TestPackedLinear:
    @given(
        tokens=st.integers(0, 200),
        inputs=st.integers(1, 150),
        outputs=st.integers(1, 150),
        bias=st.booleans(),
        dtype=dtypes,
        turned=st.booleans(),
        seed=st.integers(0, 999),
    )
    @settings(max_examples=50)
    def test_is_the_linear(self, tokens, inputs, outputs, bias, dtype, turned, seed):
        generator = torch.Generator().manual_seed(seed)
        linear = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)
        x = torch.randn(2, inputs, tokens, generator=generator).to(dtype).transpose(1, 2)
        x = x if turned else x.contiguous()
        output = PackedLinear(linear)(x)
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        # Sums in float32 however the numbers are kept, rounded once.
        sums = F.linear(x.double().abs(), linear.weight.double().abs(), linear.bias.double().abs() if bias else None)
        assert output.dtype == dtype and output.shape == (2, tokens, outputs)
        bound = HALF_STEP[dtype] * exact.abs() + (inputs + 1) * 2**-24 * sums
        assert ((output - exact).abs() <= 1.01 * bound).all()

    @both_dtypes
    @pytest.mark.parametrize("bias", [True, False])
    def test_state_dict_is_that_of_the_linear(self, dtype, bias):
        linear = nn.Linear(145, 24, bias=bias, dtype=dtype)
        state = PackedLinear(linear).state_dict()
        assert state.keys() == linear.state_dict().keys()
        for name, tensor in linear.state_dict().items():
            assert torch.equal(state[name], tensor) and state[name].dtype == dtype

    @both_dtypes
    def test_no_call_lays_weights_out_again(self, dtype):
        """By oneDNN's own log, whatever the number of tokens: the gain would be gone."""
        compute = (
            f"linear = PackedLinear(torch.nn.Linear(1152, 1152, dtype={dtype}))\n"
            f"for tokens in (1, 120, 1000, 2048):\n"
            f"    for layer in (linear, PackedGELU(linear)): layer(torch.randn(tokens, 1152, dtype={dtype}))"
        )
        command = f"import torch\nfrom diffusers_localdit.packed_linear import PackedGELU, PackedLinear\n{compute}"
        printed = subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"ONEDNN_VERBOSE": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        executed = [line.split(",exec,cpu,")[1].split(",") for line in printed.splitlines() if ",exec,cpu," in line]
        assert [kind for kind, *_ in executed] == ["reorder"] + 8 * ["inner_product"]
        assert not any("ref" in implementation for _, implementation, *_ in executed)

    @given(magnitude=st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e4]), dtype=dtypes, seed=st.integers(0, 999))
    @settings(max_examples=50)
    def test_gelu_of_its_sums(self, magnitude, dtype, seed):
        """Rounded once, after the GELU."""
        generator = torch.Generator().manual_seed(seed)
        linear = nn.Linear(24, 40).to(dtype).requires_grad_(False)
        x = (magnitude * torch.randn(70, 24, generator=generator)).to(dtype)
        exact = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
        output = PackedGELU(PackedLinear(linear))(x)
        assert output.dtype == dtype
        sums = F.linear(x.double().abs(), linear.weight.double().abs(), linear.bias.double().abs())
        assert ((output - exact).abs() <= HALF_STEP[dtype] * exact.abs() + 50 * 2**-24 * sums).all()

    @both_dtypes
    def test_a_hook_sees_what_the_linear_gives(self, dtype):
        linear, x, seen = nn.Linear(16, 3, dtype=dtype), torch.randn(5, 16, dtype=dtype), []
        layer = PackedGELU(PackedLinear(linear))
        layer.proj.register_forward_hook(lambda module, arguments, output: seen.append(output.clone()))
        output = layer(x)
        assert torch.equal(seen[0], PackedLinear(linear)(x))
        assert torch.equal(output, F.gelu(seen[0], approximate="tanh"))

    def test_what_it_cannot_do_is_refused(self):
        layer = PackedLinear(nn.Linear(4, 3))
        with pytest.raises(ValueError, match="PackedLinear computes on the CPU and without gradients"):
            layer(torch.randn(2, 4, requires_grad=True))
        with pytest.raises(ValueError, match=r"packed in torch.float32 got torch.bfloat16; choose the dtype before"):
            layer(torch.randn(2, 4, dtype=torch.bfloat16))
        with pytest.raises(Exception, match="PackedLinear cannot be compiled"):
            torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 4))


@all_kinds
class TestWhatIsKeptForTheProcessor:
    """Of no use to a copy or a file: they have the weight, and pack it again."""

    @both_dtypes
    def test_copies(self, kind, dtype):
        x, layer = torch.randn(5, 16, dtype=dtype), kind(nn.Linear(16, 3, dtype=dtype))
        expected = layer(x)
        for copied in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(copied(x), expected)
            assert copied.state_dict().keys() == layer.state_dict().keys() == {"weight", "bias"}

    @both_dtypes
    def test_a_state_dict_is_loaded(self, kind, dtype):
        x, others = torch.randn(5, 16, dtype=dtype), nn.Linear(16, 3, dtype=dtype)
        layer = kind(nn.Linear(16, 3, dtype=dtype))
        layer.load_state_dict(others.state_dict())
        assert torch.equal(layer(x), kind(others)(x))

    def test_an_unfit_state_dict_is_refused(self, kind):
        layer, others = kind(nn.Linear(16, 3)), nn.Linear(17, 3).state_dict()
        before = layer.weight
        with pytest.raises(RuntimeError, match=r"weight must be of shape \(3, 16\), not \(3, 17\)"):
            layer.load_state_dict(others)
        with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
            layer.load_state_dict({"bias": others["bias"]})
        assert torch.equal(layer.weight, before)

    def test_hooks_are_not_lost(self, kind):
        """Nor is a model in float8, which a hook of layerwise casting computes with."""
        transformer = load()
        transformer.transformer_blocks[1].ff.net[2].register_forward_hook(lambda *arguments: None)
        with pytest.raises(ValueError, match="a hook on the linear layer '2' is in the way"):
            (pack_linears if kind is PackedLinear else quantize_int8)(transformer)
        assert {type(module) for module in transformer.modules()}.isdisjoint({PackedLinear, Int8Linear})


@needs_int8
def test_quantized_weights_follow_the_model_into_another_dtype():
    layer = Int8Linear(nn.Linear(16, 3)).to(torch.bfloat16)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.bfloat16}


@needs_packing
class TestPackedModel:
    @pytest.mark.parametrize("use_global_context", [True, False])
    def test_computes_the_same_in_float32(self, use_global_context):
        torch.manual_seed(0)
        config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": 8}
        transformer = LocalDiTTransformer2DModel(**config, use_global_context=use_global_context)
        expected = forward(transformer)
        output = forward(pack_linears(transformer))
        assert (output - expected).norm() < 1e-6 * expected.norm()

    @both_dtypes
    def test_saved_it_is_the_model_that_it_was(self, dtype, tmp_path):
        transformer, packed = load(dtype=dtype), pack_linears(load(dtype=dtype))
        packed.save_pretrained(tmp_path)
        loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.state_dict().keys() == transformer.state_dict().keys()
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in transformer.state_dict().items())

    def test_all_linear_layers_of_the_blocks(self):
        transformer = pack_linears(load())
        kinds = {type(module) for module in transformer.transformer_blocks.modules()}
        assert {PackedLinear, PackedGELU} <= kinds and not {nn.Linear, GELU} & kinds
        assert type(transformer.proj_out) is nn.Linear
        layers = [module for module in transformer.modules() if type(module) is PackedLinear]
        again = [module for module in pack_linears(transformer).modules() if type(module) is PackedLinear]
        assert [*map(id, layers)] == [*map(id, again)]  # nothing left to do

    @torch.no_grad()
    @both_dtypes
    def test_feed_forward_in_slabs(self, dtype, monkeypatch):
        transformer = pack_linears(load(dtype=dtype))
        feed_forward = transformer.transformer_blocks[0].ff
        dim = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        x = torch.randn(2, 40, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = feed_forward(x)
        calls = []
        forward = PackedGELU.forward
        monkeypatch.setattr(PackedGELU, "forward", lambda self, x: calls.append(x.shape[1]) or forward(self, x))
        monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 2 * 16 * dim)
        torch.testing.assert_close(feed_forward(x), expected)
        assert calls == [16, 16, 8]

    def test_weights_of_another_kind_stay(self):
        """As torchao's quantized ones, which are tensors in linear layers of PyTorch."""
        transformer = load()
        linear = transformer.transformer_blocks[0].ff.net[2]
        quantized = linear.weight.detach().as_subclass(type("Quantized", (torch.Tensor,), {}))
        linear.weight = nn.Parameter(quantized, requires_grad=False)
        pack_linears(transformer)
        assert transformer.transformer_blocks[0].ff.net[2] is linear

    def test_gelus_that_stay(self):
        """One that somebody expects to be told of, and one that is exact."""
        transformer, packed, seen = load(), load(), []
        for model in (transformer, packed):
            model.transformer_blocks[1].ff.net[0].approximate = "none"
        packed.transformer_blocks[0].ff.net[0].register_forward_hook(lambda *arguments: seen.append(arguments))
        expected = forward(transformer)
        output = forward(pack_linears(packed))
        kinds = [type(block.ff.net[0]) for block in packed.transformer_blocks]
        assert kinds == [GELU, GELU] + [PackedGELU] * (len(kinds) - 2)
        assert len(seen) == 1
        assert (output - expected).norm() < 1e-6 * expected.norm()

    def test_projections_fused_before_and_after(self):
        transformer, packed = load(), pack_linears(load())
        expected = forward(transformer)
        transformer.fuse_qkv_projections()
        packed.fuse_qkv_projections()  # from the packed weights, into linears of PyTorch
        for model in (pack_linears(transformer), packed, pack_linears(packed)):
            assert type(model.transformer_blocks[0].attn.to_qkv) in (PackedLinear, nn.Linear)
            output = forward(model)
            assert (output - expected).norm() < 1e-6 * expected.norm()

    @needs_int8
    def test_quantized_afterwards_it_is_in_int8(self):
        output = forward(quantize_int8(pack_linears(load())))
        assert torch.equal(output, forward(quantize_int8(load())))
        quantized = pack_linears(quantize_int8(load()))
        kinds = {type(module) for module in quantized.transformer_blocks.modules()}
        assert {Int8Linear, GELU} <= kinds and PackedGELU not in kinds

    def test_other_transformers_of_diffusers(self):
        """The benchmark packs PixArt's as well."""
        from diffusers import PixArtTransformer2DModel

        torch.manual_seed(0)
        config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": 8}
        transformer = PixArtTransformer2DModel(**config, cross_attention_dim=24, sample_size=128)
        expected = forward(transformer)
        output = forward(pack_linears(transformer))
        block = transformer.transformer_blocks[0]
        assert type(block.attn1.to_q) is PackedLinear and type(block.ff.net[0]) is PackedGELU
        assert (output - expected).norm() < 1e-6 * expected.norm()

    def test_lora_is_refused(self):
        peft = pytest.importorskip("peft")
        transformer = load()
        transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
        before = copy.deepcopy(transformer.state_dict())
        with pytest.raises(ValueError, match="fuse_lora"):
            pack_linears(transformer)
        assert transformer.state_dict().keys() == before.keys()


class TestWhereItServes:
    @pytest.mark.parametrize(
        ("device", "dtype", "capabilities", "reason"),
        [
            ("cuda", torch.float32, {"avx512_f": True}, "the device is cuda"),
            ("cpu", torch.float16, {"avx512_f": True}, "the model is in torch.float16"),
            ("cpu", torch.float32, {"avx2": True}, "need a processor with AVX-512"),
            ("cpu", torch.float32, {"avx512_f": True}, None),
            ("cpu", torch.bfloat16, {"avx512_f": True, "avx512_bf16": True}, None),
        ],
    )
    def test_reason(self, device, dtype, capabilities, reason, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        said = why_not_packed(torch.device(device), dtype)
        assert said is None if reason is None else reason in said

    def test_elsewhere_it_says_why_not_and_changes_nothing(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        transformer = load()
        with pytest.raises(ValueError, match="need a processor with AVX-512"):
            pack_linears(transformer)
        assert PackedLinear not in {type(module) for module in transformer.modules()}

    @needs_packing
    @pytest.mark.parametrize(
        ("dtype", "capabilities", "kind"),
        [("float32", None, PackedLinear), ("float32", {}, nn.Linear), ("int8", None, Int8Linear)],
    )
    def test_pictures_are_made_with_packed_weights(self, dtype, capabilities, kind, monkeypatch):
        if capabilities is not None:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        loaded_as = {"model": str(BUNDLED_MODEL), "dtype": dtype, "device": "cpu"}
        pipe = load_pipeline(LocalDiTPipeline, loaded_as, offload="none")
        assert type(pipe.transformer.transformer_blocks[0].ff.net[2]) is kind
