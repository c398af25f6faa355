"""
The window attention operator alone: from projected queries, keys and values in image order, through per-head RMS norm,
rotary embedding and shifted windows with position bias, back to image order; forward and backward.

Each row says which share of the device's copy rate, measured in the same run, the operator reaches when it is charged
with reading its inputs and writing its outputs once. Every contender is first compared with the readable reference in
float64; if one differs, nothing is timed. What cannot run here is listed as not measured, with the reason. The last
line is JSON.

On a GPU launches are not counted: what is timed is the replay of a CUDA graph that holds several calls. A call alone
would take as long as the CPU needs to launch its kernels.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F

from diffusers_localdit.kernels import reference
from diffusers_localdit.kernels.cpu_processor import why_not_cpu
from diffusers_localdit.kernels.processor import why_not_there
from diffusers_localdit.transformer_localdit import (
    apply_rotary,
    rotary_table,
    window_attention_bias,
    window_geometry,
)

EPS = 1e-10
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
SETS = 3  # of inputs, taken in turn, so that no call finds its inputs in the cache
ROUNDS_OF_GRAPH = 4  # of all sets
WARM_UP_COPIES = 20  # until a GPU's clocks are up
WARM_UP_TURNS = 2  # not counted


class Problem:
    """Sizes, geometry and parameters that the contenders share."""

    def __init__(self, args: argparse.Namespace):
        self.height, self.width, self.window_size, self.heads = args.height, args.width, args.window, args.heads
        self.shift, self.device, self.dtype = args.shift, torch.device(args.device), getattr(torch, args.dtype)
        self.rotary = rotary_table(args.height, args.width, args.head_dim, self.device)
        self.geometry = window_geometry(args.height, args.width, args.window, args.shift, self.rotary, self.device)
        self.norm_q, self.norm_k = (self.random(args.head_dim) for _ in range(2))
        self.bias_table = self.random((2 * args.window - 1) ** 2, args.heads)
        self.shape = (args.batch, args.height * args.width, args.heads * args.head_dim)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def inputs(self) -> list[torch.Tensor]:
        """Query, key and value as parts of one projection, as `fuse_qkv_projections` gives them."""
        return [x.requires_grad_() for x in self.random(*self.shape[:2], 3 * self.shape[2]).chunk(3, dim=-1)]

    def prepare(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Norm and rotary embedding: `(B, L, heads, head_dim)`."""
        x = F.rms_norm(x.unflatten(-1, (self.heads, -1)), weight.shape, weight, EPS)
        return apply_rotary(x, *self.rotary)


def sdpa(problem: Problem):
    """PyTorch's attention on windows that are gathered and put back by index."""
    p, geometry = problem, problem.geometry
    index = geometry.map_to_token.unflatten(1, (-1, p.window_size)).unflatten(0, (-1, p.window_size)).transpose(1, 2)
    index = index.reshape(-1, p.window_size**2)  # (n, w*w)

    def attend(query, key, value):
        query, key = p.prepare(query, p.norm_q), p.prepare(key, p.norm_k)
        value = value.unflatten(-1, (p.heads, -1))
        query, key, value = (
            F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1)
            for x in (query, key, value)
        )  # (B*n, w*w, heads, head_dim)
        bias = window_attention_bias(p.bias_table, geometry, p.shape[0]).to(query.dtype)
        output = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=bias)
        output = output.transpose(1, 2).reshape(p.shape[0], -1, p.shape[2])
        return output.index_select(1, geometry.token_to_window)

    return attend


def plain(problem: Problem):
    p, geometry = problem, problem.geometry

    def attend(query, key, value):
        cos, sin = (x.to(query.dtype) for x in p.rotary)
        weights = (x.to(query.dtype) for x in (p.norm_q, p.norm_k, p.bias_table))
        indices = (geometry.map_to_token, geometry.token_to_window)
        return reference.local_window_attention(
            query, key, value, *weights, cos, sin, *indices, p.window_size, EPS, 1.0, False
        )[0]

    return attend


def kernels(problem: Problem):
    """What `install_triton_kernels` uses: CUDA kernels where they serve, else Triton's."""
    from diffusers_localdit.kernels import ops

    p, geometry = problem, problem.geometry

    def attend(query, key, value):
        weights = (p.norm_q, p.norm_k, p.bias_table)
        indices = (geometry.map_to_token, geometry.token_to_window)
        return ops.local_window_attention(
            query, key, value, *weights, *p.rotary, *indices, p.window_size, EPS, 1.0, False
        )[0]

    return attend


def cpu(problem: Problem):
    """What `install_cpu_kernels` uses."""
    from diffusers_localdit.kernels import cpu
    from diffusers_localdit.kernels.bands import split_into_bands

    p, [band] = problem, split_into_bands(problem.geometry, None)

    def attend(query, key, value):
        output = query.new_empty(p.shape)
        weights = (p.norm_q, p.norm_k, p.bias_table)
        cpu.local_window_attention(query, key, value, *weights, band, EPS, 1.0, output, with_maps=False)
        return output

    return attend


def flex(problem: Problem):
    """FlexAttention over all tokens, with a block mask that keeps windows apart and a bias by relative position."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, w = problem, problem.window_size
    # Shifted windows: the roll carries the map's first rows and columns to its end, where the region mask sets them
    # apart. Hence without padding two tokens meet if they lie in one window of the shifted grid.
    token = torch.arange(p.height * p.width, device=p.device)
    row, column = token // p.width, token % p.width
    window = ((row - p.shift + w) // w) * (p.width // w + 2) + (column - p.shift + w) // w
    table = p.bias_table.t().contiguous()

    def same_window(batch, head, query, key):
        return window[query] == window[key]

    def add_bias(score, batch, head, query, key):
        entry = (row[query] - row[key] + w - 1) * (2 * w - 1) + column[query] - column[key] + w - 1
        return score + table[head, entry.clamp(0, (2 * w - 1) ** 2 - 1)]

    mask = create_block_mask(same_window, None, None, p.height * p.width, p.height * p.width, device=p.device)
    compiled = torch.compile(flex_attention, fullgraph=True)

    def attend(query, key, value):
        query, key = p.prepare(query, p.norm_q), p.prepare(key, p.norm_k)
        value = value.unflatten(-1, (p.heads, -1))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return compiled(query, key, value, score_mod=add_bias, block_mask=mask).transpose(1, 2).flatten(2)

    return attend


def natten(problem: Problem):
    """NATTEN's blocked attention: a stride as large as the window. It knows neither bias nor shift."""
    from natten import na2d

    p = problem

    def attend(query, key, value):
        query, key = p.prepare(query, p.norm_q), p.prepare(key, p.norm_k)
        value = value.unflatten(-1, (p.heads, -1))
        query, key, value = (x.unflatten(1, (p.height, p.width)) for x in (query, key, value))
        return na2d(query, key, value, kernel_size=p.window_size, stride=p.window_size).flatten(1, 2).flatten(2)

    return attend


CONTENDERS = {
    "kernels": kernels,
    "cpu": cpu,
    "sdpa": sdpa,
    "sdpa-compiled": sdpa,
    "plain": plain,
    "flex": flex,
    "natten": natten,
}


def modes(name: str, problem: Problem) -> tuple[str, ...]:
    """FlexAttention has no backward pass on a CPU, and the CPU kernels have none at all."""
    for_inference = name == "cpu" or (name == "flex" and problem.device.type == "cpu")
    return ("forward",) if for_inference else ("forward", "backward")


def why_not(name: str, problem: Problem, has_bias: bool) -> str | None:
    """Why a contender cannot run here."""
    padded = problem.geometry.map_to_token.numel() > problem.height * problem.width
    if name == "kernels":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed."
        return why_not_there(problem.device, problem.dtype)
    if name == "cpu":
        return why_not_cpu(problem.device, problem.dtype)
    if name == "flex" and padded:
        return "Padding tokens, which take part, are not among the tokens that it sees."
    if name == "natten" and importlib.util.find_spec("natten") is None:
        return "NATTEN is not installed."
    if name == "natten" and (problem.shift != 0 or has_bias or padded):
        return "It serves --shift 0 --no-bias without padding only."
    return None


def check(name: str, function, problem: Problem, inputs: list[torch.Tensor], dtype_name: str) -> None:
    """Output and gradients against the reference in float64; refuses to go on if they differ."""
    with_gradients = "backward" in modes(name, problem)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    expected = plain(problem)(*doubles)
    with torch.set_grad_enabled(with_gradients):
        actual = function(*inputs)
    pairs = [(actual, expected)]
    if with_gradients:
        gradient = problem.random(*problem.shape)
        pairs += zip(
            torch.autograd.grad(actual, inputs, gradient), torch.autograd.grad(expected, doubles, gradient.double())
        )
    for x, y in pairs:
        error = ((x.double() - y).norm() / y.norm()).item()
        if not error < TOLERANCE[dtype_name]:
            raise SystemExit(f"{name} differs from the reference by {error:.2e}: nothing is timed.")


class Clock:
    """Seconds of a run: by device events on a GPU, by the wall on a CPU. Also the copy that tells the copy rate."""

    def __init__(self, problem: Problem):
        self.on_gpu = problem.device.type == "cuda"
        self.source = problem.random(2**30 // problem.dtype.itemsize if self.on_gpu else 2**24)
        self.target = torch.empty_like(self.source)

    def copy(self) -> None:
        self.target.copy_(self.source)

    def __call__(self, run: Callable[[], object]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.copy()  # busy with this, the GPU does not wait for the launch of what is timed
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


class Calls:
    """One contender's calls in one mode, one by one."""

    def __init__(self, function, mode: str, sets: list[list[torch.Tensor]], gradient: torch.Tensor):
        self.function, self.mode, self.sets, self.gradient = function, mode, sets, gradient

    def seconds(self, clock: Clock, turn: int) -> float:
        """Of a call with the inputs whose turn it is."""
        inputs = self.sets[turn % SETS]
        if self.mode == "forward":
            with torch.no_grad():
                return clock(partial(self.function, *inputs))
        output = self.function(*inputs)
        return clock(partial(torch.autograd.grad, output, inputs, self.gradient))


class CapturedCalls:
    """One contender's calls in one mode as a CUDA graph: with each set of inputs several times."""

    def __init__(
        self, function, mode: str, sets: list[list[torch.Tensor]], gradient: torch.Tensor, stream: torch.cuda.Stream
    ):
        stream.wait_stream(torch.cuda.current_stream())
        # The backward pass runs on the stream of the forward pass, which must therefore be the one that is captured.
        # (This also brings the old stream back where a capture fails.)
        with torch.cuda.stream(stream), torch.set_grad_enabled(mode == "backward"):
            if mode == "forward":
                self.calls = [partial(function, *inputs) for inputs in sets]
            else:  # each replay needs what the forward passes saved
                self.calls = [
                    partial(torch.autograd.grad, function(*inputs), inputs, gradient, retain_graph=True)
                    for inputs in sets
                ]
            for call in self.calls:
                call()  # what compiles or sets up libraries cannot be captured
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                # All are kept: each call writes to a place of its own, not to one that is in the cache.
                self.results = [call() for _ in range(ROUNDS_OF_GRAPH) for call in self.calls]
        torch.cuda.synchronize()

    def seconds(self, clock: Clock, turn: int) -> float:
        """Of a call on average."""
        return clock(self.graph.replay) / len(self.results)


def take_turns(calls: dict[Hashable, Calls | CapturedCalls], clock: Clock, runs: int) -> tuple[float, dict]:
    """Bytes that a copy reads and writes in a second, and the seconds of each one's call in every turn."""
    for _ in range(WARM_UP_COPIES if clock.on_gpu else 0):
        clock.copy()
    copies, seconds = [], {key: [] for key in calls}
    for turn in range(runs + WARM_UP_TURNS):
        copies.append(clock(clock.copy))
        for key, of_one in calls.items():
            seconds[key].append(of_one.seconds(clock, turn))
    copy_rate = 2 * clock.source.nbytes / statistics.median(copies[WARM_UP_TURNS:])
    return copy_rate, {key: times[WARM_UP_TURNS:] for key, times in seconds.items()}


def first_line(error: BaseException) -> str:
    """What went wrong in a capture: the error of its end says only that something did."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Arguments of a `Problem`, and how often it is measured."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--height", type=int, default=64 if on_gpu else 32, help="of the map in tokens (%(default)s)")
    parser.add_argument("--width", type=int, default=64 if on_gpu else 32, help="of the map in tokens (%(default)s)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=72)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--shift", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50 if on_gpu else 7)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--no-bias", action="store_true", help="a position bias of zeros")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    return parser.parse_args()


def measure(problem: Problem, args: argparse.Namespace) -> tuple[float, dict[tuple[str, str], list[float]], dict]:
    """
    Bytes that a copy reads and writes in a second; seconds of a call, in each turn, by contender and mode; and who is
    not measured, with the reason.
    """
    on_gpu = problem.device.type == "cuda"
    sets = [problem.inputs() for _ in range(SETS)]
    gradient = problem.random(*problem.shape)
    clock = Clock(problem)
    if on_gpu:
        torch._functorch.config.donated_buffer = False  # compiled backward passes keep what the next replay needs
        make_calls = partial(CapturedCalls, stream=torch.cuda.Stream())
    else:
        make_calls = Calls

    calls, not_measured = {}, {}
    for name in args.contenders:
        if (reason := why_not(name, problem, not args.no_bias)) is not None:
            not_measured[name] = reason
            continue
        print(f"{name} is made ready and compared", file=sys.stderr, flush=True)
        function = CONTENDERS[name](problem)
        if name == "sdpa-compiled":
            function = torch.compile(function, fullgraph=True)
        try:
            check(name, function, problem, problem.inputs(), args.dtype)
        except NotImplementedError as error:
            if name != "natten":
                raise
            not_measured[name] = f"It does not serve this: {first_line(error)}"
            continue
        try:
            calls |= {(name, mode): make_calls(function, mode, sets, gradient) for mode in modes(name, problem)}
        except RuntimeError as error:
            if not on_gpu:
                raise
            not_measured[name] = f"No CUDA graph: {first_line(error)}"

    copy_rate, seconds = take_turns(calls, clock, args.runs)
    return copy_rate, seconds, not_measured


def make_row(name: str, mode: str, times: list[float], tensor_bytes: int, copy_rate: float) -> dict:
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4)
    moved = tensor_bytes * (4 if mode == "forward" else 7)  # q, k, v, out; q, k, v and four gradients
    return {
        "contender": name,
        "mode": mode,
        "ms": round(median * 1e3, 4),
        "quartiles_ms": [round(quartiles[0] * 1e3, 4), round(quartiles[2] * 1e3, 4)],
        "share_of_copy_rate": round(moved / median / copy_rate, 3),
    }


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    problem = Problem(args)
    if args.no_bias:
        problem.bias_table.zero_()
    copy_rate, seconds, not_measured = measure(problem, args)

    tensor_bytes = math.prod(problem.shape) * problem.dtype.itemsize
    rows = [make_row(*key, times, tensor_bytes, copy_rate) for key, times in seconds.items()]
    device = device_name(problem.device)
    print(f"{device}; copy rate {copy_rate / 1e9:.1f} GB/s; {vars(args)}")
    for row in rows:
        print("  ".join(f"{value!s:>18}" for value in row.values()))
    for name, reason in not_measured.items():
        print(f"{name:>18}  not measured: {reason}")
    print(
        json.dumps(
            {
                "device": device,
                "settings": vars(args),
                "copy_gb_per_s": round(copy_rate / 1e9, 1),
                "rows": rows,
                "not_measured": not_measured,
            }
        )
    )


if __name__ == "__main__":
    main(parse_arguments())
