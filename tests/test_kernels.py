"""
Triton kernels. What they compute is checked by kernel_checks.py, in processes under Triton's interpreter and on a GPU;
here they are also compiled for GPUs, for which none is needed.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from own_process import python, run_pytest
from transformer_inputs import relative_error, tiny_transformer

from diffusers_localdit.kernels import install_triton_kernels, reference, why_not_triton
from diffusers_localdit.transformer_localdit import window_geometry

CHECKS = Path(__file__).parent / "kernel_checks.py"
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on any GPU from Ampere on


def test_under_the_interpreter():
    pytest.importorskip("triton")
    run_pytest(str(CHECKS), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu():
    run_pytest(str(CHECKS), TRITON_INTERPRET="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_computes_in_half_precision(dtype):
    """As the benchmark of the operator has it, beside the kernels."""
    torch.manual_seed(0)
    geometry = window_geometry(5, 8, 4, 1, (None, None), torch.device("cpu"))
    shapes = [(1, *geometry.map_to_token.shape, 16)] * 3 + [(49, 2), (1, 40, 16)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    output, expected = (
        reference.context_window_attention(*numbers, geometry.map_to_token, geometry.token_to_window, 4, 0.5)
        for numbers in (tensors, [x.double() for x in tensors])
    )
    assert output.dtype == dtype
    assert relative_error(output, expected) < 1e-2


def test_the_package_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import diffusers_localdit
assert not any(name.startswith("diffusers_localdit.kernels") for name in sys.modules)
from diffusers_localdit.kernels import why_not_triton
from transformer_inputs import tiny_transformer
print(why_not_triton(tiny_transformer(num_layers=1)))
"""
    process = python("-c", program, PYTHONPATH=str(CHECKS.parent))
    assert "Triton is not installed" in process.stdout, process.stderr


def test_without_cuda_there_is_a_reason():
    pytest.importorskip("triton")
    model = tiny_transformer(num_layers=1)
    assert "run on CUDA devices, not on 'cpu'" in why_not_triton(model)
    with pytest.raises(RuntimeError, match="run on CUDA devices"):
        install_triton_kernels(model)
    assert why_not_triton(model.to("meta")) is not None


@pytest.mark.parametrize("capability, serves", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_before_ampere_is_too_old(capability, serves, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = why_not_triton(tiny_transformer(num_layers=1), torch.device("cuda"))
    assert reason is None if serves else "compute capability 8.0 (Ampere) or later" in reason


def test_without_a_compiler_for_cuda_triton_serves(monkeypatch, caplog):
    pytest.importorskip("triton")
    from diffusers_localdit.kernels import window4

    def compile_kernel(*arguments, **settings):
        assert torch.utils.cpp_extension.CUDA_HOME is not None  # or PyTorch would ask for a toolkit
        raise OSError("Could not find libnvrtc")

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(window4.logger, "propagate", True)
    tensor = type("OnGPU", (), {"is_cuda": True, "device": torch.device("cpu")})
    for _ in range(2):
        assert not window4.may_launch(tensor)
    assert caplog.text.count("Triton's are used instead, which are slower: Could not find libnvrtc") == 1
    window4.can_compile.cache_clear()


def test_threads_compile_one_after_the_other(monkeypatch):
    """Each sets a folder in PyTorch for the time of it."""
    pytest.importorskip("triton")
    from torch.utils import cpp_extension

    from diffusers_localdit.kernels import window4

    def compile_kernel(*arguments):
        folders = {cpp_extension.CUDA_HOME}
        time.sleep(0.05)
        return folders | {cpp_extension.CUDA_HOME}

    monkeypatch.setattr(torch.cuda, "_compile_kernel", compile_kernel)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with ThreadPoolExecutor(max_workers=3) as threads:
        folders = [*threads.map(window4.compile_kernel, *["abc"] * 2)]
    assert folders == [{"no-toolkit"}] * 3 and cpp_extension.CUDA_HOME is None


def test_each_thread_joins_the_context_before_its_first_launch(monkeypatch):
    pytest.importorskip("triton")
    from diffusers_localdit.kernels import window4

    calls = []
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **settings: calls.append("context"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(window4, "kernel", lambda *arguments: lambda *arguments: calls.append("launch"))
    for _ in range(2):
        with ThreadPoolExecutor(max_workers=1) as thread:
            for _ in range(2):
                thread.submit(window4.launch, "name", torch.device("cpu"), {"WARPS": 4}, (1, 1, 1), []).result()
    assert calls == ["context", "launch", "launch"] * 2


def launches_of(monkeypatch, compute) -> list:
    """The kernels that `compute()` launches, with their arguments, launching none."""
    from triton.runtime.jit import JITFunction

    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(
            JITFunction,
            "__getitem__",
            lambda kernel, grid: (
                lambda *args, **kwargs: launches.append((kernel, {**dict(zip(kernel.arg_names, args)), **kwargs}))
            ),
        )
        compute()
    return launches


def compile_kernel(kernel, arguments: dict, capability: int):
    """As a launch would compile it: what is 1 becomes a constant, multiples of 16 are known to be such."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import mangle_type

    options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name.isupper() or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    "capability, window_size, head_dim, dtype, batch_size",
    [
        pytest.param(90, 4, 72, torch.bfloat16, 2, id="hopper-bf16-one-tile"),
        pytest.param(80, 12, 128, torch.float32, 1, id="ampere-fp32-tiles", marks=pytest.mark.slow),
        pytest.param(86, 12, 128, torch.float16, 1, id="ampere-fp16-tiles", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gpus(monkeypatch, capability, window_size, head_dim, dtype, batch_size):
    pytest.importorskip("triton")
    from diffusers_localdit.kernels import query_gate, query_stage, window_attention

    heads, side = 2, 2 * window_size
    tokens = [torch.zeros(batch_size, side**2, heads * head_dim, dtype=dtype) for _ in range(3)]
    token_map = torch.zeros(batch_size, side, side, heads * head_dim, dtype=dtype)
    weight = torch.zeros(head_dim, dtype=dtype)
    table = torch.zeros((2 * window_size - 1) ** 2, heads, dtype=dtype)
    rotary = torch.zeros(side**2, 1, head_dim // 2)
    preparation = window_attention.Preparation(weight, weight, rotary, rotary, 1e-10)
    place = torch.zeros(side, side, dtype=torch.int64)
    rest = (table, place, place.flatten(), window_size, 0.5)
    convolution = torch.zeros(heads * head_dim, 1, 3, 3, dtype=dtype)
    means, narrow = torch.zeros(3, batch_size, heads * head_dim), torch.zeros(head_dim, heads * head_dim, dtype=dtype)

    def compute():
        window_attention.forward(*tokens, preparation, *rest, with_maps=True)
        window_attention.forward(*tokens, None, *rest, residual=tokens[0])
        window_attention.backward(tokens[0], token_map, token_map, *tokens, preparation, *rest)
        window_attention.backward(tokens[0], None, None, *tokens, None, *rest)
        query_stage.forward(token_map, convolution)
        query_stage.backward(token_map, token_map[:, 0, 0], token_map, convolution)
        query_gate.gated_weight(means, narrow, narrow.T, narrow.T @ narrow, dtype)

    launches = launches_of(monkeypatch, compute)
    assert len(launches) == (14 if window_size <= 8 else 18)
    for kernel, arguments in launches:
        compiled = compile_kernel(kernel, arguments, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY, (kernel.__name__, compiled.metadata.shared)
