"""
Checks of the Triton kernels, run by test_kernels.py in processes of their own: under Triton's interpreter, which has
to be chosen before Triton is imported, and on a GPU. Memory that PyTorch leaves uninitialised is filled with NaN
meanwhile, so that a place that no kernel writes shows.
"""

import copy
import json
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import emulated_warp
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
import watched_memory as memory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformer_inputs import map_tensors, random_inputs, relative_error, tiny_transformer

from diffusers_localdit.conversion import load_original
from diffusers_localdit.kernels import (
    install_triton_kernels,
    ops,
    part_sums,
    query_gate,
    reference,
    try_triton_kernels,
    uninstall_kernels,
    why_not_triton,
    window4,
    window_attention,
)
from diffusers_localdit.kernels.processor import LocalDiTTritonAttnProcessor
from diffusers_localdit.kernels.triton_backward import _gather_table_gradient
from diffusers_localdit.transformer_localdit import (
    GlobalContextQueryStage,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    rotary_table,
    window_geometry,
)

pytestmark = pytest.mark.usefixtures("float32_is_float32")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
MANY = 1 if DEVICE.type == "cpu" else 20  # the interpreter is slow
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter():
    """
    Triton's interpreter patches its language at each launch, which is needed, and again at each call of a function:
    ours have what they need then, and its own, in a module that stays patched, after the first call. It also builds a
    table of all dtypes for each dtype that it looks up.
    """
    from triton.runtime import interpreter

    patch_and_call, look_up = interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    called, found = set(), {}

    def call(function, *args, **kwargs):
        if function in called or function.fn.__module__.startswith("diffusers_localdit"):
            return function.rewrite()(*args, **kwargs)
        called.add(function)
        return patch_and_call(function, *args, **kwargs)

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        yield


@pytest.fixture(autouse=True, scope="module")
def watched_memory():
    """Under the interpreter all accesses of all programs are checked."""
    with memory.watched() if DEVICE.type == "cpu" else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cuda_launches(monkeypatch) -> list[str]:
    """The launches of CUDA kernels; without a GPU on an emulated warp."""
    launches, run = [], window4.launch if DEVICE.type == "cuda" else emulated_warp.launch

    def launch(name, *arguments):
        launches.append(name)
        run(name, *arguments)

    monkeypatch.setattr(window4, "launch", launch)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(window4, "may_launch", lambda tensor: True)
        # So few warps that each serves several windows, some one more than others.
        monkeypatch.setattr(window4, "resident_warps", lambda name, device: 2)
        monkeypatch.setattr(window_attention, "BACKWARD_PROGRAMS", 2)
    return launches


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(function, tensors: list[torch.Tensor], dtype: torch.dtype, *arguments) -> list[torch.Tensor]:
    """Outputs, and gradients of all tensors for random gradients of the outputs."""
    tensors = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]
    outputs = function(*tensors, *arguments)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x.numel() > 0]
    torch.autograd.backward(outputs, [random_tensor(i, *x.shape).to(x.dtype) for i, x in enumerate(outputs)])
    return [*(x.detach() for x in outputs), *(tensor.grad for tensor in tensors)]


def assert_same(kernel, truth, tensors, dtype, *arguments):
    """The kernel in `dtype` against the reference in float64, both given the numbers that `dtype` can hold."""
    tensors = [tensor.to(dtype) for tensor in tensors]
    actual = run(kernel, tensors, dtype, *arguments)
    expected = run(truth, tensors, torch.float64, *arguments)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == dtype
        assert relative_error(x, y) < TOLERANCE[dtype], i


def unpacked(function):
    """The function given query, key and value as parts of one packed tensor."""
    return lambda packed, *arguments: function(*packed.chunk(3, dim=-1), *arguments)


def check_window_attention(
    height, width, window_size, shift, heads, head_dim, batch_size=1, dtype=torch.float32, rope=True, with_maps=True
):
    rotary = rotary_table(height, width, head_dim, DEVICE) if rope else (None, None)
    geometry = window_geometry(height, width, window_size, shift, rotary, DEVICE)
    indices = (geometry.map_to_token, geometry.token_to_window)
    length, channels = height * width, heads * head_dim
    bias_table = random_tensor(4, (2 * window_size - 1) ** 2, heads)
    assert_same(
        unpacked(
            lambda q, k, v, a, b, t: ops.local_window_attention(
                q, k, v, a, b, t, *rotary, *indices, window_size, 0.1, 0.5, with_maps
            )
        ),
        unpacked(
            lambda q, k, v, a, b, t: reference.local_window_attention(
                q, k, v, a, b, t, *rotary, *indices, window_size, 0.1, 0.5, with_maps
            )
        ),
        [
            random_tensor(1, batch_size, length, 3 * channels),
            random_tensor(2, head_dim),
            random_tensor(3, head_dim),
            bias_table,
        ],
        dtype,
    )
    if with_maps:
        map_shape = (batch_size, *geometry.map_to_token.shape, channels)
        assert_same(
            ops.context_window_attention,
            reference.context_window_attention,
            [
                *(random_tensor(seed, *map_shape) for seed in (5, 6, 7)),
                bias_table,
                random_tensor(8, batch_size, length, channels),
            ],
            dtype,
            *indices,
            window_size,
            0.5,
        )
    assert_same_in_place(
        [random_tensor(seed, batch_size, length, channels) for seed in (1, 9, 10)],
        [*(random_tensor(seed, head_dim) for seed in (2, 3)), bias_table],
        dtype,
        (*rotary, *indices, window_size, 0.1, 0.5, with_maps),
    )


@torch.no_grad()
def assert_same_in_place(tokens, weights, dtype, arguments):
    """The operator that writes over the queries gives to the bit what the other one gives."""
    query, key, value, norm_q, norm_k, bias_table = (x.to(dtype) for x in (*tokens, *weights))
    local = (norm_q, norm_k, bias_table, *arguments)
    expected = ops.local_window_attention(query, key, value, *local)
    output = query.clone()
    actual = output, *ops.local_window_attention_(output, key, value, *local)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@triton.jit
def _copy(source, target, step, SIZE: tl.constexpr):
    places = tl.program_id(0) * step + tl.arange(0, SIZE)
    tl.store(target + places, tl.load(source + places))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter alone is watched")
@pytest.mark.parametrize(
    "source, target, step, fault",
    [
        (slice(0, 6), slice(10, 18), 4, "2 accesses of program (1, 0, 0) are outside"),
        (slice(0, 8), slice(10, 17), 4, "1 accesses of program (1, 0, 0) are outside"),
        (slice(0, 8), slice(10, 18), 3, "1 numbers are written by more than one program"),
        (slice(0, 8), slice(1, 9), 4, "1 numbers are read by one program and written by another"),
        (slice(0, 8), slice(0, 8), 4, None),
    ],
)
def test_what_a_kernel_must_not_do_is_seen(source, target, step, fault):
    numbers = torch.zeros(20)
    with nullcontext() if fault is None else pytest.raises(Exception, match=re.escape(fault)):
        _copy[(2,)](numbers[source], numbers[target], step, SIZE=4)


@given(
    height=st.integers(1, 6 * MANY),
    width=st.integers(1, 5 * MANY),
    window_size=st.integers(3, 5),
    layer=st.integers(0, 6),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 12, 20]),
    batch_size=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rope=st.booleans(),
    with_maps=st.booleans(),
)
@settings(max_examples=3 * MANY, derandomize=True, database=None)
def test_window_attention(height, width, window_size, layer, **arguments):
    check_window_attention(height, width, window_size, layer % window_size, **arguments)


@pytest.mark.parametrize(
    "height, width, window_size, shift, heads, head_dim, batch_size, dtype",
    [
        pytest.param(3, 4, 2, 1, 1, 8, 1, torch.float32, id="smallest-window"),
        pytest.param(4, 6, 4, 1, 1, 72, 1, torch.bfloat16, id="head-in-two-blocks"),
        pytest.param(7, 9, 8, 3, 1, 8, 1, torch.bfloat16, id="64-rows"),
        pytest.param(7, 5, 6, 4, 1, 8, 1, torch.float32, id="two-tiles"),
        pytest.param(3, 6, 6, 2, 2, 8, 2, torch.float32, id="two-tiles-of-heads-and-samples"),
        pytest.param(3, 2, 9, 8, 1, 8, 1, torch.float32, id="three-tiles-mostly-padding"),
    ],
)
def test_window_attention_of_shape(height, width, window_size, shift, heads, head_dim, batch_size, dtype):
    check_window_attention(height, width, window_size, shift, heads, head_dim, batch_size, dtype)


@pytest.mark.parametrize("window_size", [2, 4, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.skipif(DEVICE.type == "cpu", reason="too many for the interpreter")
def test_window_attention_of_many_shapes(window_size, head_dim, dtype):
    for shift in (0, window_size - 1):
        check_window_attention(33, 22, window_size, shift, 3, head_dim, batch_size=2, dtype=dtype)


@pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    "height, width, shift, heads, batch_size, dtype, rope, with_maps",
    [
        pytest.param(8, 8, 1, 2, 1, torch.bfloat16, True, True, id="bfloat16"),
        pytest.param(7, 5, 2, 3, 2, torch.float16, True, True, id="float16-padding"),
        pytest.param(4, 12, 3, 1, 1, torch.float16, False, False, id="no-rope-no-maps"),
        pytest.param(12, 4, 0, 1, 1, torch.bfloat16, True, False, id="no-shift-no-maps"),
    ],
)
def test_cuda_kernels(cuda_launches, height, width, shift, heads, batch_size, dtype, rope, with_maps):
    check_window_attention(
        height, width, 4, shift, heads, 72, batch_size=batch_size, dtype=dtype, rope=rope, with_maps=with_maps
    )
    context = {"window4_context"} if with_maps else set()
    assert set(cuda_launches) == {"window4_local", "window4_backward"} | context


def moved(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins half of 16 bytes after an address at which 16 bytes can be read at once."""
    numbers = 8 // x.itemsize
    return torch.cat([x.new_zeros(numbers), x.flatten()])[numbers:].view(x.shape)


@torch.no_grad()
@pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    "odd",
    [None, "query", "key", "value", "norm_q", "norm_k", "bias_table", "rotary_cos", "rotary_sin", "rows", "batch"],
)
def test_cuda_kernels_are_left_out_where_16_bytes_cannot_be_read_at_once(odd, cuda_launches):
    strides = {"rows": (17 * 224, 220, 1), "batch": (17 * 224 - 4, 224, 1)}.get(odd, (17 * 224, 224, 1))
    packed = random_tensor(1, 2, 17, 224).bfloat16().as_strided((2, 16, 216), strides)
    query, key, value = packed.chunk(3, dim=-1)
    if odd in ("query", "key", "value"):
        query, key, value = (x.contiguous() for x in (query, key, value))
    geometry = window_geometry(4, 4, 4, 1, rotary_table(4, 4, 72, DEVICE), DEVICE)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "norm_q": random_tensor(2, 72),
        "norm_k": random_tensor(3, 72),
        "bias_table": random_tensor(4, 49, 1),
        "rotary_cos": geometry.rotary_cos,
        "rotary_sin": geometry.rotary_sin,
    }
    if odd in tensors:
        tensors[odd] = moved(tensors[odd])
    rest = (geometry.map_to_token, geometry.token_to_window, 4, 0.1, 0.5, False)
    output = ops.local_window_attention(*tensors.values(), *rest)[0]
    expected = reference.local_window_attention(*(x.double() for x in tensors.values()), *rest)[0]
    assert relative_error(output, expected) < TOLERANCE[torch.bfloat16]
    assert cuda_launches == (["window4_local"] if odd is None else [])


@torch.no_grad()
def test_parts_of_a_packed_tensor_are_read_where_they_are(monkeypatch):
    read = []

    def serves(common, *others):
        read.extend(common[f"{name}_ptr"].data_ptr() for name in ("query", "key", "value"))
        return False

    monkeypatch.setattr(window4, "serves", serves)
    parts = random_tensor(1, 1, 4, 24).chunk(3, dim=-1)
    geometry = window_geometry(2, 2, 2, 1, (None, None), DEVICE)
    parameters = [random_tensor(i, *shape) for i, shape in enumerate([(8,), (8,), (9, 1)])]
    rest = (None, None, geometry.map_to_token, geometry.token_to_window, 2, 1e-10, 1.0, False)
    ops.local_window_attention(*parts, *parameters, *rest)
    assert read == [x.data_ptr() for x in parts]


@torch.no_grad()
@pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="there is no g++")
def test_large_queries_and_keys_stay_in_the_range_of_half_precision(cuda_launches):
    """The norm takes their size away, also where they times its weight would be more than float16 can hold."""
    query, key, value = (random_tensor(seed, 1, 16, 72).half() for seed in (1, 2, 3))
    geometry = window_geometry(4, 4, 4, 1, (None, None), DEVICE)
    weight = torch.full((72,), 8.0, device=DEVICE, dtype=torch.float16)
    rest = (weight, weight, random_tensor(4, 49, 1).half(), None, None)
    rest += (geometry.map_to_token, geometry.token_to_window, 4, 1e-10, 1.0, False)
    expected = ops.local_window_attention(query, key, value, *rest)[0]
    actual = ops.local_window_attention(4096 * query, 4096 * key, value, *rest)[0]
    assert set(cuda_launches) == {"window4_local"}
    assert torch.equal(actual, expected)  # powers of two change no rounding


@pytest.mark.parametrize("parts", [1, 7, part_sums.MOST_PARTS + 6])
def test_sum_of_parts(parts):
    x = random_tensor(1, 2, parts, 21)
    assert relative_error(part_sums.sum_parts(x, torch.float32), x.double().sum(1)) < 1e-6


@given(
    height=st.integers(1, 9 * MANY),
    width=st.integers(1, 5 * MANY),
    channels=st.sampled_from([3, 70]),
    batch_size=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=3 * MANY, derandomize=True, database=None)
def test_depthwise_gelu(height, width, channels, batch_size, dtype):
    tensors = [random_tensor(1, batch_size, height, width, channels), random_tensor(2, channels, 1, 3, 3)]
    assert_same(ops.depthwise_gelu, reference.depthwise_gelu, tensors, dtype)


@given(
    height=st.integers(1, 9 * MANY),
    width=st.integers(1, 5 * MANY),
    channels=st.sampled_from([3, 70]),
    hidden=st.sampled_from([1, 40]),
    batch_size=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    weight_dtype=st.sampled_from([None, torch.float32]),  # autocast leaves weights in float32
)
@settings(max_examples=3 * MANY, derandomize=True, database=None)
def test_query_stage_without_gradients(**arguments):
    check_query_stage(**arguments)


@pytest.mark.parametrize(
    "height, width, channels, hidden, batch_size, dtype",
    [
        pytest.param(3, 3, 300, 288, 2, torch.float32, id="blocks-of-channels-and-units"),
        pytest.param(9, 5, 70, 140, 2, torch.bfloat16, id="strips"),
    ],
)
def test_query_stage_of_shape(height, width, channels, hidden, batch_size, dtype):
    check_query_stage(height, width, channels, hidden, batch_size, dtype)


def check_query_stage(height, width, channels, hidden, batch_size, dtype, weight_dtype=None):
    shapes = [(channels, 1, 3, 3), (hidden, channels), (channels, hidden), (channels, channels)]
    weights = [random_tensor(i, *shape) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]
    weights = [weights[0].to(dtype), *(x.to(weight_dtype or dtype) for x in weights[1:])]
    token_map = random_tensor(5, batch_size, height, width, channels).to(dtype)
    expected = reference.query_stage(token_map.double(), *(x.double() for x in weights))
    ops.query_stage_(token_map, *weights)
    assert relative_error(token_map, expected) < TOLERANCE[dtype]


@torch.no_grad()
def check_gate(strips, channels):
    means = random_tensor(1, strips, 2, channels)
    squeeze = random_tensor(2, 4, channels) / channels**0.5
    excite, pointwise = random_tensor(3, channels, 4), random_tensor(4, channels, channels)
    gate = torch.sigmoid(F.gelu(means.double().sum(0) @ squeeze.double().T) @ excite.double().T)  # (B, C)
    actual = query_gate.gated_weight(means, squeeze, excite, pointwise, torch.float32)
    assert relative_error(actual, pointwise.double() * gate[:, None, :]) < TOLERANCE[torch.float32]


def test_gate_of_more_strips_than_are_summed_at_a_time():
    check_gate(query_gate.STRIPS + 6, 6)


def test_gate_of_more_rows_than_a_program_has(monkeypatch):
    monkeypatch.setattr(query_gate, "ROWS", 16)
    monkeypatch.setattr(query_gate, "TILES", 2)
    check_gate(3, 70)


def test_table_gradient_of_more_programs_than_are_summed_at_a_time():
    programs, heads, w = 11, 2, 3
    grad_bias = random_tensor(1, programs, heads, w * w, w * w)
    entry = window_geometry(w, w, w, 0, (None, None), DEVICE).relative_position.flatten()  # of each pair
    expected = torch.zeros((2 * w - 1) ** 2, heads, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, entry, grad_bias.double().sum(0).flatten(1).T)
    actual = torch.empty_like(expected, dtype=torch.float32)
    _gather_table_gradient[actual.shape](grad_bias, actual, programs, heads, w, 16, PART=4)
    assert relative_error(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("with_maps", [True, False])
def test_operators_of_the_local_branch_are_well_formed(with_maps):
    """With tokens in half precision and parameters in float32, as under autocast."""
    geometry = window_geometry(2, 2, 2, 1, (None, None), DEVICE)
    tokens = [random_tensor(i, 1, 4, 8).bfloat16().requires_grad_() for i in range(3)]
    parameters = [random_tensor(i, *shape).requires_grad_() for i, shape in enumerate([(8,), (8,), (9, 1)])]
    rest = (None, None, geometry.map_to_token, geometry.token_to_window, 2, 1e-10, 1.0, with_maps)
    torch.library.opcheck(ops.local_window_attention, (*tokens, *parameters, *rest))
    query, key, value, *parameters = (x.detach() for x in (*tokens, *parameters))
    # Compiled graphs rely on what the backward operator's fake says of strides, too.
    maps = [random_tensor(i, *((1, 2, 2, 8) if with_maps else (0,))).bfloat16() for i in range(2)]
    arguments = (random_tensor(6, 1, 4, 8).bfloat16(), *maps, query, key, value, *parameters, *rest)
    torch.library.opcheck(ops.local_window_attention_backward, arguments)
    torch.library.opcheck(ops.local_window_attention_, (query.clone(), key, value, *parameters, *rest))


def test_operators_of_the_context_branch_are_well_formed():
    geometry = window_geometry(2, 2, 2, 1, (None, None), DEVICE)
    rest = (geometry.map_to_token, geometry.token_to_window, 2, 1.0)
    maps = [random_tensor(i, 1, 2, 2, 8).bfloat16().requires_grad_() for i in range(3)]
    residual = random_tensor(4, 1, 4, 8).bfloat16().requires_grad_()
    table = random_tensor(5, 9, 1).requires_grad_()
    convolution = random_tensor(6, 8, 1, 3, 3).bfloat16().requires_grad_()
    torch.library.opcheck(ops.context_window_attention, (*maps, table, residual, *rest))
    torch.library.opcheck(ops.depthwise_gelu, (maps[0], convolution))
    *maps, residual, table, convolution = (x.detach() for x in (*maps, residual, table, convolution))
    torch.library.opcheck(ops.context_window_attention_backward, (residual, *maps, table, *rest))
    torch.library.opcheck(ops.depthwise_gelu_backward, (maps[0], maps[0][:, 0, 0], maps[1], convolution))
    squeeze, excite, pointwise = (random_tensor(i, *shape) for i, shape in enumerate([(2, 8), (8, 2), (8, 8)]))
    torch.library.opcheck(ops.query_stage_, (maps[0].clone(), convolution, squeeze, excite, pointwise))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="threads on a CPU need no context")
def test_a_backward_pass_is_the_first_thing_in_its_thread():
    """Such a thread has no context yet. The sizes are those of the CUDA kernels."""
    geometry = window_geometry(4, 4, 4, 1, (None, None), DEVICE)
    tokens, table = random_tensor(0, 1, 16, 72).half(), random_tensor(1, 49, 1).half()
    norm, empty = torch.ones_like(tokens[0, 0]), tokens.new_empty(0)
    arguments = (tokens, empty, empty, tokens, tokens, tokens, norm, norm, table, None, None, geometry.map_to_token)
    arguments += (geometry.token_to_window, 4, 1e-10, 1.0, False)
    expected = ops.local_window_attention_backward(*arguments)
    with ThreadPoolExecutor() as threads:
        actual = threads.submit(ops.local_window_attention_backward, *arguments).result()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected))


def test_gradients_repeat_bit_by_bit():
    geometry = window_geometry(6, 4, 2, 1, (None, None), DEVICE)
    tensors = [random_tensor(1, 1, 24, 24), random_tensor(2, 8), random_tensor(3, 8), random_tensor(4, 9, 1)]
    arguments = (None, None, geometry.map_to_token, geometry.token_to_window, 2, 1e-10, 1.0, False)
    first, second = (run(unpacked(ops.local_window_attention), tensors, torch.float32, *arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


# In attention modules and whole models


def assert_equal_with_kernels(module, set_processor, compute, tolerance: float) -> None:
    """Compares what `compute()` returns and the gradients of the parameters, with the kernels and without."""
    results = []
    for processor in (LocalDiTWindowAttnProcessor(), LocalDiTTritonAttnProcessor()):
        set_processor(processor)
        module.zero_grad()
        output = compute()
        (output * random_tensor(9, *output.shape)).sum().backward()
        results.append([output.detach(), *(x.grad for x in module.parameters() if x.grad is not None)])
        with torch.no_grad():  # where the kernels overwrite what they can
            assert relative_error(compute(), output) < tolerance
    expected, actual = results
    # Some gradients are zero but for rounding: a bias of the keys shifts all scores of a query alike.
    least = 0.1 * max(x.norm() for x in expected)
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() < tolerance * max(y.norm(), least)


def check_attention(
    heads=2, head_dim=8, window_size=3, use_global_context=True, fused=False, autocast=False, compiled=False
):
    dim, (height, width) = heads * head_dim, (window_size + 1, window_size)
    torch.manual_seed(0)
    attn = LocalDiTWindowAttention(dim, heads, window_size, use_global_context)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=1.2 / dim**0.5)
    attn.to(DEVICE)
    if fused:
        attn.fuse_projections()
    rotary = rotary_table(height, width, head_dim, DEVICE)
    geometry = window_geometry(height, width, window_size, 2, rotary, DEVICE)
    x = random_tensor(1, 2, height * width, dim)
    call = torch.compile(attn, fullgraph=True, backend="aot_eager") if compiled else attn

    def compute():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return call(x, geometry).float()

    assert_equal_with_kernels(attn, attn.set_processor, compute, 3e-2 if autocast else 1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_global_context": False, "fused": True}, {"autocast": True}, {"compiled": True}],
    ids=["global", "fused-projections", "autocast", "compiled"],
)
def test_attention_equals_pytorch(changes):
    check_attention(**changes)


@pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="there is no g++")
def test_cuda_kernels_under_autocast(cuda_launches):
    """Tokens in bfloat16, parameters in float32."""
    check_attention(heads=1, head_dim=72, window_size=4, autocast=True)
    assert set(cuda_launches) == {"window4_local", "window4_context", "window4_backward"}


@torch.no_grad()
@pytest.mark.parametrize("adapted", [None, "depthwise", "squeeze", "excite", "pointwise"])
def test_a_query_stage_heeds_adapters_without_gradients(adapted, monkeypatch):
    torch.manual_seed(0)
    stage, query_map = GlobalContextQueryStage(8).to(DEVICE), random_tensor(1, 2, 4, 3, 8)
    if adapted is not None:
        module = getattr(stage, adapted)
        module.forward = lambda x, forward=module.forward: 2 * forward(x)
    whole_stages, query_stage_ = [], ops.query_stage_
    monkeypatch.setattr(ops, "query_stage_", lambda *tensors: whole_stages.append(query_stage_(*tensors)))
    expected = stage([query_map])[0]
    assert relative_error(LocalDiTTritonAttnProcessor()._query_stage(stage, query_map.clone()), expected) < 1e-6
    assert len(whole_stages) == (adapted is None)
    with torch.enable_grad():
        LocalDiTTritonAttnProcessor()._query_stage(stage, query_map.clone())
    assert len(whole_stages) == (adapted is None)


@pytest.mark.parametrize(
    "hooked", ["global_context", "global_context.query_stages.0", "global_context.query_stages.1"]
)
def test_hooks_in_the_global_branch_are_called(hooked):
    module = LocalDiTWindowAttention(24, heads=2, window_size=2, use_global_context=True).to(DEVICE)
    calls = []
    module.get_submodule(hooked).register_forward_hook(lambda *arguments: calls.append(hooked))
    tokens, geometry = random_tensor(1, 2, 12, 24), window_geometry(3, 4, 2, 1, (None, None), DEVICE)
    expected = module(tokens, geometry)
    module.set_processor(LocalDiTTritonAttnProcessor())
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert relative_error(module(tokens, geometry), expected) < 1e-5
    assert calls == [hooked] * 3


@torch.no_grad()
def test_a_map_with_gaps_is_no_place_for_a_query_stage():
    weights = [random_tensor(i, *shape) for i, shape in enumerate([(8, 1, 3, 3), (2, 8), (8, 2), (8, 8)])]
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        ops.query_stage_(random_tensor(5, 2, 4, 6, 8)[:, :, :5], *weights)


@torch.no_grad()
def test_queries_with_gaps_are_not_written_over():
    geometry = window_geometry(2, 2, 2, 1, (None, None), DEVICE)
    query, key, value = random_tensor(1, 1, 4, 24).chunk(3, dim=-1)
    weights = [random_tensor(i, *shape) for i, shape in enumerate([(8,), (8,), (9, 1)])]
    settings = (None, None, geometry.map_to_token, geometry.token_to_window, 2, 1e-10, 1.0, False)
    with pytest.raises(ValueError, match="follow each other"):
        ops.local_window_attention_(query, key, value, *weights, *settings)


def load_golden(name: str):
    folder = GOLDEN / name
    case = json.loads((folder / "case.json").read_text())
    sizes = {key: case["config"][key] for key in ("window_size", "sample_size", "use_rope")}
    model = load_original(folder / "original_with_processor.pt", **sizes)
    tensors = load_file(folder / case["forward"][0]["file"])
    added = {key: tensors.pop(key) for key in ("resolution", "aspect_ratio")}
    expected = tensors.pop("sample")
    return model.to(DEVICE), map_tensors(lambda x: x.to(DEVICE), {**tensors, "added_cond_kwargs": added}), expected


@pytest.mark.usefixtures("golden_frequencies")
@torch.no_grad()
def test_model_with_kernels_meets_the_original():
    model, inputs, expected = load_golden("window4_global")
    install_triton_kernels(model)
    assert relative_error(model(**inputs).sample.cpu(), expected) < 2e-6


def test_training_gradients_equal_those_of_pytorch():
    model = tiny_transformer(num_layers=2).to(DEVICE).train()
    model.enable_gradient_checkpointing()
    inputs = map_tensors(lambda x: x.to(DEVICE), random_inputs(10, 6, batch_size=1))

    def compute():
        return torch.nn.functional.mse_loss(model(**inputs).sample, torch.ones_like(inputs["hidden_states"]))

    assert_equal_with_kernels(model, model.set_attn_processor, compute, 1e-5)


@torch.no_grad()
def test_repeated_blocks_share_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = tiny_transformer(num_layers=2).to(DEVICE), tiny_transformer(num_layers=2).to(DEVICE)
    install_triton_kernels(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((16, 8), (6, 22)):
        inputs = map_tensors(lambda x: x.to(DEVICE), random_inputs(height, width))
        assert relative_error(model(**inputs).sample, plain(**inputs).sample) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_install_and_uninstall():
    model = tiny_transformer(num_layers=1).to(DEVICE)
    processors = {name: type(processor) for name, processor in model.attn_processors.items()}
    assert why_not_triton(model) is None
    install_triton_kernels(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.transformer_blocks[0].attn.processor, LocalDiTTritonAttnProcessor)
    uninstall_kernels(model)
    assert {name: type(processor) for name, processor in model.attn_processors.items()} == processors


class TestTrial:
    """Kernels as a default."""

    @staticmethod
    def outcome(prepare=lambda transformer: None, **settings) -> tuple[str | None, set[str]]:
        """What is said, and which processors the self-attention has then."""
        transformer = tiny_transformer(num_layers=2, window_size=2)
        prepare(transformer)
        random_numbers = torch.get_rng_state()
        said = try_triton_kernels(transformer, DEVICE, torch.bfloat16, **settings)
        assert torch.equal(torch.get_rng_state(), random_numbers)
        assert all(x.device.type == "cpu" and x.grad is None for x in transformer.parameters())
        return said, {type(block.attn.processor).__name__ for block in transformer.transformer_blocks}

    @pytest.mark.parametrize("weights, training", [(torch.bfloat16, False), (torch.float32, True)])
    def test_kernels_that_agree_stay(self, weights, training, monkeypatch):
        """Tried in the dtype that is asked for, to which autocast brings what weights in another one make."""
        dtypes = []

        def attend(*arguments, attend=ops.local_window_attention_):
            dtypes.append(arguments[0].dtype)
            return attend(*arguments)

        monkeypatch.setattr(ops, "local_window_attention_", attend)
        said = self.outcome(lambda transformer: transformer.to(weights), training=training)
        assert said == (None, {"LocalDiTTritonAttnProcessor"})
        assert dtypes == [torch.bfloat16]

    def test_new_weights_that_are_zero_agree(self):
        said, _ = self.outcome(lambda transformer: [torch.nn.init.zeros_(x) for x in transformer.parameters()])
        assert said is None

    def test_kernels_that_fail_go(self, monkeypatch):
        def fail(*arguments):
            raise RuntimeError("no compiler\nat all")

        monkeypatch.setattr(ops, "local_window_attention_", fail)
        said = self.outcome()
        assert said == ("The kernels do not run here: no compiler", {"LocalDiTWindowAttnProcessor"})

    @pytest.mark.parametrize(
        "name, wrong",
        [("local_window_attention_", float("nan")), ("query_stage_", 1.2), ("context_window_attention", 1.2)],
    )
    def test_kernels_that_give_other_numbers_go(self, name, wrong, monkeypatch):
        operator = getattr(ops, name)

        def wrong_numbers(*arguments):
            output = operator(*arguments)
            arguments[0].mul_(wrong)
            return output if name != "context_window_attention" else output * wrong

        monkeypatch.setattr(ops, name, wrong_numbers)
        said = self.outcome()
        assert said == ("The kernels give other numbers than PyTorch here.", {"LocalDiTWindowAttnProcessor"})

    def test_a_wrong_gradient_is_seen_in_training(self, monkeypatch):
        def wrong_gradient(*arguments, attend=ops.local_window_attention):
            return tuple(2 * x - x.detach() for x in attend(*arguments))

        monkeypatch.setattr(ops, "local_window_attention", wrong_gradient)
        assert self.outcome()[0] is None
        assert self.outcome(training=True)[0] == "The kernels give other numbers than PyTorch here."

    def test_a_processor_of_ones_own_stays(self):
        class Mine(LocalDiTWindowAttnProcessor):
            pass

        said = self.outcome(lambda transformer: transformer.transformer_blocks[1].attn.set_processor(Mine()))
        assert said == ("A Mine computes it, and is left in its place.", {"LocalDiTWindowAttnProcessor", "Mine"})


@pytest.mark.parametrize(
    "config, dtype, reason",
    [
        ({"window_size": 17}, torch.float32, "windows of 2 to 16"),
        ({"attention_head_dim": 132}, torch.float32, "heads of 8 to 128"),
        ({}, torch.float64, "not in torch.float64"),
    ],
    ids=["window", "head", "dtype"],
)
def test_refuses_with_a_reason(config, dtype, reason):
    model = tiny_transformer(num_layers=1, **config).to(DEVICE, dtype)
    assert reason in why_not_triton(model)
    with pytest.raises(RuntimeError, match=reason):
        install_triton_kernels(model)


def test_refuses_where_another_backend_was_asked_for():
    model = tiny_transformer(num_layers=1).to(DEVICE)
    model.set_attention_backend("native")
    assert "'native' was asked for" in why_not_triton(model)
    model.reset_attention_backend()
    assert why_not_triton(model) is None


def test_a_call_in_an_unfit_dtype_is_refused():
    model = tiny_transformer(num_layers=1).to(DEVICE)
    install_triton_kernels(model)
    inputs = map_tensors(lambda x: x.to(DEVICE, torch.float64), random_inputs())
    with pytest.raises(RuntimeError, match="uninstall_kernels"):
        model.double()(**inputs)


@pytest.mark.parametrize("enabled", [True, False])
def test_forward_derivatives_are_refused(enabled):
    model = tiny_transformer(num_layers=1).to(DEVICE)
    install_triton_kernels(model)
    inputs = map_tensors(lambda x: x.to(DEVICE), random_inputs())
    latents = inputs.pop("hidden_states")
    with pytest.raises(RuntimeError, match="no derivative in forward mode"), torch.set_grad_enabled(enabled):
        torch.func.jvp(lambda x: model(x, **inputs).sample, (latents,), (latents,))


def test_weights_that_were_left_elsewhere_are_refused():
    model = tiny_transformer(num_layers=1).to(DEVICE)
    install_triton_kernels(model)
    model.transformer_blocks[0].attn.norm_q.to("meta")
    with pytest.raises(RuntimeError, match="offload whole models or blocks"):
        model(**map_tensors(lambda x: x.to(DEVICE), random_inputs()))
