"""The CPU kernels: what they compute, whom they leave it to, and how they come to be compiled."""

import copy
import ctypes
import gc
import math
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from guarded_memory import GuardedCalls
from hypothesis import given, settings
from hypothesis import strategies as st
from own_process import python
from peft import LoraConfig
from test_golden import FORWARD_CASES, load_case
from torch.autograd import forward_ad
from transformer_inputs import in_dtype, random_inputs, relative_error, tiny_transformer

from diffusers_localdit import transformer_localdit
from diffusers_localdit.kernels import (
    LocalDiTCPUAttnProcessor,
    cpu,
    install_cpu_kernels,
    try_cpu_kernels,
    uninstall_kernels,
    why_not_cpu_kernels,
)
from diffusers_localdit.kernels.bands import split_into_bands
from diffusers_localdit.packed_linear import pack_linears, why_not_packed
from diffusers_localdit.transformer_localdit import (
    LocalDiTRMSNorm,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    rotary_table,
    window_geometry,
)

CPU = torch.device("cpu")
KERNELS = {"local", "context", "depthwise_gelu", "excite"}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}
INSTRUCTIONS = cpu.instructions()
INSTRUCTION_SETS = {"avx2": ["-mfma", "-mavx2"]}
if INSTRUCTIONS and "-mavx512f" in INSTRUCTIONS:
    INSTRUCTION_SETS["avx512"] = INSTRUCTIONS

pytestmark = [
    pytest.mark.skipif(INSTRUCTIONS is None, reason="there is no AVX2 or no Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


@pytest.fixture(scope="class", params=INSTRUCTION_SETS)
def library(request) -> Iterator[ctypes.CDLL]:
    """The library for each set of instructions that this processor has. Memory that nothing was written to is NaN."""
    compiled = ctypes.CDLL(str(cpu.compiled(INSTRUCTION_SETS[request.param])))
    torch.use_deterministic_algorithms(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "load_library", lambda: compiled)
        yield compiled
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def guards(monkeypatch) -> GuardedCalls:
    return GuardedCalls(monkeypatch, cpu)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that were called."""
    names, run = [], cpu.run
    monkeypatch.setattr(cpu, "run", lambda name, *arguments: names.append(name) or run(name, *arguments))
    return names


def random_attention(dtype=torch.float32, heads=2, head_dim=12, window_size=4, use_global_context=True):
    torch.manual_seed(0)
    attn = LocalDiTWindowAttention(heads * head_dim, heads, window_size, use_global_context)
    for name, parameter in attn.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        else:  # numbers stay of about their size
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 4 else parameter[0].numel() ** -0.5)
    attn.norm_q.eps = attn.norm_k.eps = 0.1  # which is seen, other than 1e-10
    return attn.eval().to(dtype)


@torch.no_grad()
def check_attention(height, width, shift, batch_size=1, dtype=torch.float32, rope=True, slab=None, **sizes):
    """In `dtype` against PyTorch in float64, on numbers that `dtype` can hold. Returns the error by PyTorch's own."""
    attn = random_attention(dtype, **sizes)
    heads, head_dim = attn.heads, len(attn.norm_q.weight)
    rotary = rotary_table(height, width, head_dim, CPU) if rope else (None, None)
    geometry = window_geometry(height, width, attn.window_size, shift, rotary, CPU)
    tokens = torch.randn(batch_size, height * width, heads * head_dim).to(dtype)
    expected = copy.deepcopy(attn).double()(tokens.double(), geometry)
    plain = relative_error(attn(tokens, geometry), expected)
    with pytest.MonkeyPatch.context() as patch:
        if slab is not None:
            patch.setattr(transformer_localdit, "SLAB_NUMBERS", slab * batch_size * heads * head_dim)
        attn.set_processor(LocalDiTCPUAttnProcessor())
        output = attn(tokens, geometry)
    assert output.dtype == dtype
    error = relative_error(output, expected)
    assert error < TOLERANCE[dtype]
    return error / plain


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    window_size=st.integers(2, 9),
    layer=st.integers(0, 8),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from(range(8, 132, 4)),
    batch_size=st.integers(1, 3),
    dtype=st.sampled_from(list(cpu.DTYPES)),
    rope=st.booleans(),
    use_global_context=st.booleans(),
    slab=st.sampled_from([None, 1, 40]),
)
@settings(max_examples=60, derandomize=True, database=None)
def test_attention(library, height, width, window_size, layer, **arguments):
    check_attention(height, width, layer % window_size, window_size=window_size, **arguments)


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.2), (torch.bfloat16, 1.01)], ids=str)
@pytest.mark.parametrize("use_global_context", [False, True])
def test_as_exact_as_pytorch(library, dtype, most, use_global_context):
    sizes = {"heads": 16, "head_dim": 72, "use_global_context": use_global_context}
    assert check_attention(24, 16, 1, dtype=dtype, **sizes) < most


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize(
    "height, width, window_size, shift, heads, head_dim",
    [(16, 12, 4, 1, 16, 72), (7, 9, 4, 3, 2, 72), (17, 3, 16, 5, 1, 128), (5, 6, 2, 1, 1, 8), (11, 9, 3, 2, 3, 20)],
)
def test_nothing_next_to_a_tensor_is_touched(
    library, guards, dtype, height, width, window_size, shift, heads, head_dim
):
    for batch_size, slab in ((1, None), (2, 2 * window_size * width)):
        check_attention(
            height, width, shift, batch_size, dtype, slab=slab, window_size=window_size, heads=heads, head_dim=head_dim
        )
    assert guards.calls >= 8


@torch.no_grad()
@pytest.mark.parametrize("use_global_context, most", [(True, 5.3), (False, 1.6)])
def test_memory_of_a_pass(use_global_context, most, monkeypatch):
    """By tokens of the picture: with global context the result is not there before the query stages are done."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from transformer import peak_bytes

    monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 256 * 96)
    attn = random_attention(heads=4, head_dim=24, use_global_context=use_global_context)
    geometry = window_geometry(64, 64, 4, 1, rotary_table(64, 64, 24, CPU), CPU)
    attn.set_processor(LocalDiTCPUAttnProcessor())
    tokens = torch.randn(1, 64 * 64, 96)
    attn(tokens, geometry)  # what is computed once is no part of a pass
    assert peak_bytes(lambda: attn(tokens, geometry), CPU) < most * tokens.nbytes


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_sanitizers_have_nothing_to_say(instructions, tmp_path):
    """Of the kernels' own memory, which is next to no tensor, and of behaviour that is not defined."""
    command = [cpu.COMPILER, "-print-file-name=libasan.so"]
    sanitizer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(sanitizer).is_absolute():
        pytest.skip("there are no sanitizers")
    program = """
import ctypes, sys
from diffusers_localdit.kernels import cpu
from test_cpu_kernels import check_attention

cpu.OPTIONS += ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
library = ctypes.CDLL(str(cpu.compiled(sys.argv[1:])))
cpu.load_library = lambda: library
for dtype in cpu.DTYPES:
    for window_size, head_dim in ((2, 8), (3, 20), (4, 72), (7, 12)):
        check_attention(5, 9, 1, 2, dtype, slab=40, window_size=window_size, head_dim=head_dim, heads=3)
"""
    environment = {
        "LD_PRELOAD": sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0",  # of other libraries
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    process = python("-c", program, *INSTRUCTION_SETS[instructions], **environment)
    assert process.returncode == 0, process.stderr[-4000:]


def test_what_may_not_be_touched_ends_the_process():
    program = """
from ctypes import c_char
import torch
from guarded_memory import guarded
for at_end, place in ((True, 40), (False, -1)):
    numbers = guarded(torch.arange(10.), at_end)
    assert numbers.tolist() == list(range(10))
    print(at_end, flush=True)
    if at_end == ({at_end}):
        c_char.from_address(numbers.data_ptr() + place).value
"""
    for at_end in (True, False):
        process = python("-c", program.format(at_end=at_end), PYTHONPATH=str(Path(__file__).parent))
        assert process.returncode == -11, process.stderr
        assert process.stdout.split()[-1] == str(at_end)


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    window_size=st.integers(2, 9),
    layer=st.integers(0, 8),
    size=st.sampled_from([None, 1, 30, 100]),
)
@settings(derandomize=True, database=None)
def test_bands_hold_each_token_once(height, width, window_size, layer, size):
    """And the places of a window's members lead to its tokens."""
    geometry = window_geometry(height, width, window_size, layer % window_size, (None, None), CPU)
    numbers = torch.arange(height * width)[None, :, None]
    result, windows = torch.full_like(numbers, -1), []
    for band in split_into_bands(geometry, size):
        assert len(band.runs) <= 2
        tokens = band.take(numbers)
        members = tokens[0, band.places, 0].where(band.places >= 0, height * width)
        assert torch.equal(band.places < 0, band.geometry.padding)
        windows.append(members)
        assert (result[0, tokens.flatten()] == -1).all()
        band.put(tokens, result)
    assert torch.equal(result, numbers)
    rows, columns = (length // window_size for length in geometry.map_to_token.shape)
    on_map = geometry.map_to_token.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)
    assert torch.equal(torch.cat(windows), on_map.flatten(0, 1))
    assert len(split_into_bands(geometry, 1)) == rows  # also after another size
    assert len(split_into_bands(geometry, None)) == 1


def test_bands_go_with_their_geometry():
    geometry = window_geometry(8, 8, 4, 1, (None, None), CPU)
    split_into_bands(geometry, 1)
    token_map = weakref.ref(geometry.map_to_token)
    del geometry
    gc.collect()
    assert token_map() is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_parts_of_one_projection_are_read_where_they_lie(library, dtype):
    """Nothing of it is written, but the prepared keys for the context."""
    attn, geometry = random_attention(dtype), window_geometry(7, 9, 4, 1, rotary_table(7, 9, 12, CPU), CPU)
    [band] = split_into_bands(geometry, None)
    projected = torch.randn(2, 63, 72).to(dtype)
    results = []
    for with_maps in (False, True):
        for apart in ((0, 1, 2), (0,), (1,), (2,), ()):
            parts = projected.clone().chunk(3, dim=-1)
            parts = [x if i in apart else x.contiguous() for i, x in enumerate(parts)]
            output = torch.empty(2, 63, 24, dtype=dtype)
            weights = (attn.norm_q.weight, attn.norm_k.weight, attn.rel_pos_bias)
            query_map = cpu.local_window_attention(
                *map(cpu.evenly_spaced, parts), *weights, band, 1e-10, 0.5, output, with_maps
            )
            results.append((output, query_map, parts[1].contiguous()))
            unchanged = [0, 2] if with_maps else [0, 1, 2]
            assert all(torch.equal(parts[i], projected.chunk(3, dim=-1)[i]) for i in unchanged)
    for i, (output, query_map, key) in enumerate(results):
        expected_output, expected_map, expected_key = results[4 if i < 5 else 9]  # of what lies together
        assert torch.equal(output, expected_output)
        assert torch.equal(key, expected_key)
        assert query_map is expected_map is None or torch.equal(query_map, expected_map)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def test_projections_that_lie_otherwise(calls, batch_size):
    """Channels apart, and samples of a larger tensor: what an adapter may give."""
    attn, geometry = random_attention(), window_geometry(8, 8, 4, 1, (None, None), CPU)
    tokens = torch.randn(batch_size, 64, 24)
    expected = attn(tokens, geometry)
    attn.set_processor(LocalDiTCPUAttnProcessor())
    linears = [attn.to_q, attn.to_k, attn.to_v, attn.global_context.to_k, attn.global_context.to_v]
    linears += [stage.pointwise for stage in attn.global_context.query_stages]
    for lie in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    ):
        for linear in linears:
            linear.forward = lambda x, linear=linear, lie=lie: lie(F.linear(x, linear.weight, linear.bias))
        assert relative_error(attn(tokens, geometry), expected) < 1e-6
    assert calls


@torch.no_grad()
def test_the_number_of_threads_changes_nothing(library, monkeypatch):
    """To the bit. Of the kernels' threads: PyTorch's products have as many as before."""
    attn, geometry = random_attention(), window_geometry(24, 20, 4, 1, (None, None), CPU)
    tokens, outputs = torch.randn(1, 480, 24), []
    for number in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        outputs.append(LocalDiTCPUAttnProcessor()(attn, tokens, geometry))
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 300.0])
def test_weights_of_the_softmax(library, magnitude):
    """Also where all but one are zero: scores of up to some hundred, and strangers at -10000."""
    attn = random_attention(use_global_context=False)
    attn.rel_pos_bias.mul_(magnitude)
    geometry = window_geometry(8, 8, 4, 3, (None, None), CPU)
    tokens = torch.randn(1, 64, 24)
    expected = copy.deepcopy(attn).double()(tokens.double(), geometry)
    attn.set_processor(LocalDiTCPUAttnProcessor())
    assert relative_error(attn(tokens, geometry), expected) < 1e-6 * max(1, magnitude / 10)


@torch.no_grad()
def test_gelu_of_the_features(library):
    """To 2e-7 of the numbers that go in, or of 1; PyTorch's is exact to 4e-7."""
    numbers = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4])])
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1
    features, sums = cpu.depthwise_gelu([numbers.reshape(1, 1, -1, 1)], 0, weight)
    expected = F.gelu(numbers.double())
    assert ((features.flatten() - expected).abs() <= 2e-7 * numbers.abs().clamp(min=1)).all()
    assert math.isclose(sums.item(), expected.sum().item(), rel_tol=1e-5)


@torch.no_grad()
def test_rounding_to_bfloat16(library):
    """To the nearest, of two as near to the even one; NaN stays NaN, whatever its other bits are."""
    numbers, weight = torch.arange(64, 256, 0.5).bfloat16(), torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1 + 2**-8  # of 64 it makes 64.25, and there are 64 and 64.5
    maps = [numbers.reshape(1, 1, -1, 1)]
    assert torch.equal(
        cpu.depthwise_gelu(maps, 0, weight)[0].flatten(), (numbers.float() * weight[0, 0, 1, 1]).bfloat16()
    )
    weight[..., 1, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    assert cpu.depthwise_gelu(maps, 0, weight)[0].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_numbers_that_are_none_show(library, dtype):
    """NaN reaches what depends on it and nothing else: its window, and with the context all."""
    for use_global_context in (False, True):
        attn = random_attention(dtype, use_global_context=use_global_context)
        geometry = window_geometry(8, 8, 4, 0, (None, None), CPU)
        tokens = torch.randn(1, 64, 24).to(dtype)
        tokens[0, 9, 5] = float("nan")
        expected = attn.processor(attn, tokens, geometry)
        output = LocalDiTCPUAttnProcessor()(attn, tokens, geometry)
        assert torch.equal(output.isnan(), expected.isnan())
        assert output.isnan().all() == use_global_context


@pytest.mark.parametrize("folder, file", FORWARD_CASES)
@pytest.mark.usefixtures("golden_frequencies")
@torch.no_grad()
def test_model_with_kernels_meets_the_original(library, calls, folder, file):
    model, inputs, expected = load_case(folder, file)
    install_cpu_kernels(model)
    assert relative_error(model(**inputs).sample, expected) < 1e-6
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_packed_model(library, calls, dtype, monkeypatch):
    """The sum of a query stage is made in the product. In slabs of a few tokens."""
    if reason := why_not_packed(CPU, dtype):
        pytest.skip(reason)
    model, inputs = tiny_transformer().to(dtype), in_dtype(dtype, random_inputs(20, 12))
    exact = copy.deepcopy(model).double()(**in_dtype(torch.float64, inputs)).sample
    monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 30 * 24 * 2)
    pack_linears(model)
    plain = relative_error(model(**inputs).sample, exact)
    install_cpu_kernels(model)
    assert relative_error(model(**inputs).sample, exact) < (1.1 * plain if dtype == torch.bfloat16 else 1e-6)
    assert set(calls) == KERNELS


class TestWhomTheyLeaveItTo:
    """The same numbers to the bit as without kernels, and no kernel called."""

    @staticmethod
    def check(calls, compute, make=lambda: tiny_transformer(num_layers=2), called=False):
        results = []
        for install in (lambda model: None, install_cpu_kernels):
            model = make()
            install(model)
            results.append(compute(model))
        assert torch.equal(*results)
        assert bool(calls) == called

    def test_gradients(self, calls):
        def compute(model):
            model(**random_inputs()).sample.square().sum().backward()
            return model.transformer_blocks[0].attn.to_q.weight.grad

        self.check(calls, compute)

    @torch.no_grad()
    def test_autocast(self, calls):
        def compute(model):
            with torch.autocast("cpu", torch.bfloat16):
                return model(**random_inputs()).sample

        self.check(calls, compute)

    @torch.no_grad()
    def test_compilation(self, calls):
        attn, geometry = random_attention(), window_geometry(4, 8, 4, 1, (None, None), CPU)
        tokens, outputs = torch.randn(1, 32, 24), []
        for processor in (LocalDiTWindowAttnProcessor(), LocalDiTCPUAttnProcessor()):
            attn.set_processor(processor)
            torch._dynamo.reset()
            outputs.append(torch.compile(attn, fullgraph=True, backend="eager")(tokens, geometry))
        assert torch.equal(*outputs)
        assert not calls

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
    def test_other_dtypes(self, calls, dtype):
        def compute(model):
            return model.to(dtype)(**in_dtype(dtype, random_inputs())).sample

        self.check(calls, compute)

    @torch.no_grad()
    def test_an_attention_backend(self, calls):
        def compute(model):
            model.set_attention_backend("native")  # sets it for the whole process: that of before
            return model(**random_inputs()).sample

        self.check(calls, compute)

    @torch.no_grad()
    @pytest.mark.parametrize("skipped", ["attention", "attention_scores"])
    def test_layers_that_are_skipped(self, calls, skipped):
        names = ("attention", "attention_scores", "ff")
        skips = {f"skip_{name}": name == skipped for name in names}

        def compute(model):
            apply_layer_skip(model, LayerSkipConfig(indices=[0, 1], **skips))
            return model(**random_inputs()).sample

        self.check(calls, compute)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "hooked",
        [
            "norm_q",
            "norm_k",
            "global_context",
            "global_context.query_stages.1",
            "global_context.query_stages.0.depthwise",
        ],
    )
    def test_hooks_that_they_would_not_call(self, calls, hooked):
        def compute(model):
            for block in model.transformer_blocks:
                block.attn.get_submodule(hooked).register_forward_hook(lambda module, args, output: None)
            return model(**random_inputs()).sample

        self.check(calls, compute)

    @torch.no_grad()
    def test_adapters_in_the_place_of_what_they_read(self, calls):
        """LoRA on the convolutions, and norms that were trained besides: neither is a hook."""

        def compute(model):
            lora = {"r": 24, "target_modules": ["depthwise"], "init_lora_weights": False}
            torch.manual_seed(1)
            model.add_adapter(LoraConfig(**lora))
            return model(**random_inputs()).sample

        self.check(calls, compute)

        class Norm(LocalDiTRMSNorm):
            def forward(self, x):
                return 2 * super().forward(x)

        def compute(model):
            for block in model.transformer_blocks:
                block.attn.norm_q.__class__ = Norm
            return model(**random_inputs()).sample

        self.check(calls, compute)

    @torch.no_grad()
    def test_derivatives_in_forward_mode(self, calls):
        attn, geometry = random_attention(), window_geometry(4, 8, 4, 1, (None, None), CPU)
        tokens, direction = torch.randn(2, 1, 32, 24)
        derivatives = []
        for processor in (LocalDiTWindowAttnProcessor(), LocalDiTCPUAttnProcessor()):
            with forward_ad.dual_level():
                output = processor(attn, forward_ad.make_dual(tokens, direction), geometry)
                derivatives.append(forward_ad.unpack_dual(output).tangent)
        assert torch.equal(*derivatives)
        assert not calls

    @torch.no_grad()
    def test_transformed_functions(self, calls):
        attn, geometry = random_attention(), window_geometry(4, 8, 4, 1, (None, None), CPU)
        tokens = torch.randn(3, 1, 32, 24)
        outputs = [
            torch.func.vmap(lambda x, processor=processor: processor(attn, x, geometry))(tokens)
            for processor in (LocalDiTWindowAttnProcessor(), LocalDiTCPUAttnProcessor())
        ]
        assert torch.equal(*outputs)
        assert not calls

    @torch.no_grad()
    def test_tensors_without_numbers(self, calls):
        attn, geometry = random_attention(), window_geometry(4, 8, 4, 1, (None, None), CPU)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            tokens = torch.randn(2, 32, 24)
            assert LocalDiTCPUAttnProcessor()(attn, tokens, geometry).shape == tokens.shape
        assert not calls


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_and_fused_projections_are_heeded(calls, fused):
    """Linears are called, whatever became of them."""
    model = tiny_transformer(num_layers=2)
    if fused:
        model.fuse_qkv_projections()
    for name, module in model.named_modules():
        if ".attn." in name and type(module) is torch.nn.Linear:
            module.forward = lambda x, forward=module.forward: 1.5 * forward(x)
    expected = model(**random_inputs()).sample
    install_cpu_kernels(model)
    assert relative_error(model(**random_inputs()).sample, expected) < 1e-6
    assert calls


class TestInstallation:
    def test_install_and_uninstall(self, calls):
        model = tiny_transformer(num_layers=1)
        processors = {name: type(processor) for name, processor in model.attn_processors.items()}
        assert why_not_cpu_kernels(model) is None
        install_cpu_kernels(model)
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(copied.transformer_blocks[0].attn.processor, LocalDiTCPUAttnProcessor)
        uninstall_kernels(model)
        assert {name: type(processor) for name, processor in model.attn_processors.items()} == processors

    @pytest.mark.parametrize(
        "make, reason",
        [
            (lambda: tiny_transformer(window_size=17), "windows of 2 to 16 tokens a side, not 17"),
            (lambda: tiny_transformer(attention_head_dim=132), "heads of 8 to 128 channels, not 132"),
            (lambda: tiny_transformer().half(), "in float32 and bfloat16, not in torch.float16"),
            (lambda: tiny_transformer().to("meta"), "run on the CPU, not on 'meta'"),
        ],
    )
    def test_there_is_a_reason(self, make, reason):
        model = make()
        assert reason in why_not_cpu_kernels(model)
        assert reason in try_cpu_kernels(model)
        with pytest.raises(RuntimeError, match=reason):
            install_cpu_kernels(model)
        assert type(model.transformer_blocks[0].attn.processor) is LocalDiTWindowAttnProcessor

    def test_a_backend_that_was_asked_for_stays(self):
        model = tiny_transformer(num_layers=1)
        model.set_attention_backend("native")
        assert "reset_attention_backend" in why_not_cpu_kernels(model)
        assert "reset_attention_backend" in try_cpu_kernels(model)
        model.reset_attention_backend()
        assert why_not_cpu_kernels(model) is None

    def test_a_sequence_that_devices_share(self, monkeypatch):
        """diffusers gives the processors the configuration of context parallelism."""
        model = tiny_transformer(num_layers=2)
        processor = model.transformer_blocks[1].cross_attn.processor
        monkeypatch.setattr(processor, "_parallel_config", "some", raising=False)
        assert "context parallelism is on" in why_not_cpu_kernels(model)

    @pytest.mark.parametrize("changes", [{"avx2": False}, {"fma3": False}])
    def test_an_old_processor(self, changes, monkeypatch):
        capabilities = torch.cpu.get_capabilities()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities | changes)
        cpu.load_library.cache_clear()
        assert "processors with AVX2" in why_not_cpu_kernels(tiny_transformer(num_layers=1))

    @pytest.mark.parametrize("missing", ["avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"])
    def test_a_processor_without_one_of_the_wide_instructions(self, missing, monkeypatch):
        capabilities = torch.cpu.get_capabilities()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities | {missing: False})
        assert cpu.instructions() == ["-mfma", "-mavx2"]


class TestTrial:
    def test_kernels_that_agree_stay(self, calls):
        model = tiny_transformer(num_layers=2)
        assert try_cpu_kernels(model) is None
        assert set(calls) == KERNELS
        assert {type(block.attn.processor) for block in model.transformer_blocks} == {LocalDiTCPUAttnProcessor}
        assert try_cpu_kernels(model) == "A LocalDiTCPUAttnProcessor computes it, and is left in its place."

    @pytest.mark.parametrize(
        "name", ["local_window_attention", "add_context_window_attention_", "depthwise_gelu", "excite_"]
    )
    def test_kernels_that_give_other_numbers_go(self, name, monkeypatch):
        function = getattr(cpu, name)

        def wrong(*arguments, **settings):
            result = function(*arguments, **settings)
            written = {"local_window_attention": 9, "add_context_window_attention_": 0}
            (arguments[written[name]] if name in written else result[0]).mul_(1.1)
            return result

        monkeypatch.setattr(cpu, name, wrong)
        model = tiny_transformer(num_layers=2)
        assert try_cpu_kernels(model) == "The kernels give other numbers than PyTorch here."
        assert {type(block.attn.processor) for block in model.transformer_blocks} == {LocalDiTWindowAttnProcessor}


class TestCompilation:
    @pytest.fixture(autouse=True)
    def empty_folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cpu.constants, "HF_HOME", str(tmp_path / "home"))
        cpu.load_library.cache_clear()
        yield
        cpu.load_library.cache_clear()

    @pytest.fixture
    def commands(self, monkeypatch) -> list[list[str]]:
        commands, run = [], subprocess.run
        monkeypatch.setattr(cpu.subprocess, "run", lambda *args, **kw: commands.append(args[0]) or run(*args, **kw))
        return commands

    def test_once_for_all_processes(self, commands):
        paths = {cpu.compiled(INSTRUCTIONS) for _ in range(2)}
        assert len(paths) == len(commands) == 1
        assert [path.name for path in paths.pop().parent.iterdir()] == [cpu.compiled(INSTRUCTIONS).name]

    def test_anew_for_another_processor_and_another_source(self, commands, tmp_path, monkeypatch):
        first = cpu.compiled(["-mfma", "-mavx2"])
        source = tmp_path / cpu.SOURCE.name
        source.write_text(cpu.SOURCE.read_text() + "\n")
        monkeypatch.setattr(cpu, "SOURCE", source)
        second = cpu.compiled(["-mfma", "-mavx2"])
        third = cpu.compiled(["-mfma", "-mavx2", "-mbmi2"])
        assert len({first, second, third}) == len(commands) == 3

    def test_by_several_at_a_time(self):
        with ThreadPoolExecutor(3) as pool:
            paths = list(pool.map(cpu.compiled, [INSTRUCTIONS] * 3))
        assert ctypes.CDLL(str(paths[0])).lanes() in (8, 16)
        assert [path.name for path in paths[0].parent.iterdir()] == [paths[0].name]

    def test_without_a_compiler(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert why_not_cpu_kernels(tiny_transformer(num_layers=1)) == (
            "The kernels are not to be had: there is no g++ (Debian, Ubuntu: `apt install g++`)."
        )

    def test_with_a_compiler_that_does_not_understand(self, tmp_path, monkeypatch):
        source = tmp_path / "window_cpu.cpp"
        source.write_text("int lanes() { return 16; }\nneither this\n")
        monkeypatch.setattr(cpu, "SOURCE", source)
        reason = why_not_cpu_kernels(tiny_transformer(num_layers=1))
        assert reason.startswith("The kernels are not to be had: g++ cannot compile window_cpu.cpp: ")
        assert "neither" in reason
        assert "\n" not in reason
        assert not list((tmp_path / "home" / "diffusers_localdit").iterdir())

    def test_in_a_folder_that_may_not_be_written(self, tmp_path):
        (tmp_path / "home").write_text("a file")
        assert "Not a directory" in why_not_cpu_kernels(tiny_transformer(num_layers=1))

    def test_a_process_that_is_killed_leaves_no_library(self, tmp_path):
        program = f"""
import os
from diffusers_localdit.kernels import cpu
cpu.constants.HF_HOME = {str(tmp_path / "home")!r}
os.replace = lambda *names: os.kill(os.getpid(), 9)
cpu.compiled({INSTRUCTIONS!r})
"""
        assert subprocess.run([sys.executable, "-c", program]).returncode == -9
        assert not list((tmp_path / "home" / "diffusers_localdit").glob("*.so"))
        assert why_not_cpu_kernels(tiny_transformer(num_layers=1)) is None


def test_one_pool_of_threads(library):
    """The library's threads are PyTorch's: with those of another OpenMP they would wait for each other."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp.so" in line}
    assert [Path(path).parent for path in loaded] == [Path(torch.__file__).parent / "lib"]
