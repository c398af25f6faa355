"""
Seconds of a forward pass and of a training step: LocalDiT against diffusers' PixArt transformer and against the plain
computation of the original, full size, random weights.

All models of a table take turns in one process, and so do their matrix products alone, which are the floor under any
implementation. A model that does not give the numbers of the plain computation is not timed and its table not printed.
A full run takes hours on a CPU: choose models and sizes, or `--layers`: models of so few layers are run (each layer
costs the same) and their times multiplied to the full depth, 18 for LocalDiT, 28 or 18 for PixArt.
The weights of models named `packed-...` are laid out for the CPU (`pack_linears`), and so are those of their floor;
models named `cpu-...` have the CPU kernels besides, as `localdit` computes, and packed weights where those serve.
With `--cuda-graph` every step, the products too, is a CUDA graph whose replay is timed: the time of the GPU alone,
without that of the CPU's launches. Peak memory and parity are those of the step itself.
The last line is JSON.
"""

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from plain_transformer import plain_forward
from torch import nn
from torch.utils._pytree import tree_map

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.kernels.cpu_processor import why_not_cpu
from diffusers_localdit.packed_linear import TOKENS, PackedLinear, pack_linears, why_not_packed
from diffusers_localdit.training.models import compile_blocks
from diffusers_localdit.transformer_localdit import without_padding

LOCALDIT_LAYERS = 18
PIXART_LAYERS = {"pixart-28": 28, "pixart-18": 18, "packed-pixart-28": 28}
MODELS = [
    *PIXART_LAYERS,
    *(
        f"{kind}-{branch}"
        for kind in ("plain", "localdit", "packed", "cpu", "triton")
        for branch in ("global", "folded")
    ),
]
BASELINE = "pixart-28"
TEXT_TOKENS = 120
WARM_UP_RUNS = 3  # before a capture, as PyTorch's documentation has it
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


Step = Callable[[], list[torch.Tensor] | None]  # its results, where there is something to compare


class ParityError(Exception):
    """A model computes something else than the plain reference."""


def full_depth(name: str) -> int:
    return PIXART_LAYERS.get(name, LOCALDIT_LAYERS)


def is_packed(name: str, dtype: torch.dtype) -> bool:
    return "packed" in name or (name.startswith("cpu") and why_not_packed(torch.device("cpu"), dtype) is None)


def architecture(name: str, dtype: torch.dtype) -> str:
    """What decides the matrix products: "pixart-28", "pixart-18", "global", "folded", or one of them "packed-"."""
    if name in PIXART_LAYERS:
        return name
    branch = name.split("-")[1]
    return f"packed-{branch}" if is_packed(name, dtype) else branch


def plain_model(name: str) -> str:
    """The plain computation of what a LocalDiT computes."""
    return f"plain-{name.split('-')[1]}"


def make_inputs(height: int, width: int, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch_size, TEXT_TOKENS)
    mask[0, TEXT_TOKENS // 2 :] = 0
    inputs = {
        "hidden_states": torch.randn(batch_size, 4, height // 8, width // 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch_size, TEXT_TOKENS, 4096, generator=generator).to(dtype),
        "timestep": torch.full((batch_size,), 500),
        "encoder_attention_mask": mask,
    }
    sizes = {"resolution": [[height, width]], "aspect_ratio": [[width / height]]}
    sizes = {name: torch.tensor(value, dtype=torch.float32).repeat(batch_size, 1) for name, value in sizes.items()}
    return {name: value.to(device) for name, value in inputs.items()} | {
        "added_cond_kwargs": {name: value.to(device) for name, value in sizes.items()}
    }


@functools.cache
def make_model(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, none of them zero throughout. All kinds of one architecture have the same."""
    if name.startswith("plain"):
        return make_model(f"localdit-{name.split('-')[1]}", layers, device, dtype)
    torch.manual_seed(0)
    num_layers = layers or full_depth(name)
    with device:  # a GPU makes the weights in a fraction of the time
        if "pixart" in name:
            model = PixArtTransformer2DModel(num_layers=num_layers, sample_size=128, caption_channels=4096)
        else:
            model = LocalDiTTransformer2DModel(num_layers=num_layers, use_global_context=name.endswith("global"))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model = model.to(device, dtype).eval()
    if is_packed(name, dtype):
        pack_linears(model)
    if name.startswith("cpu"):
        from diffusers_localdit.kernels import install_cpu_kernels

        install_cpu_kernels(model)
    if name.startswith("triton"):
        from diffusers_localdit.kernels import install_triton_kernels  # needs the extra `triton`

        install_triton_kernels(model)
    return model


def compile_model(model: nn.Module, num_sizes: int) -> None:
    """Block by block and for each size anew, as in training; the plain computation, which calls no block, stays."""
    if isinstance(model, LocalDiTTransformer2DModel):
        compile_blocks(model, num_sizes)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False)


def runner(name: str, model: nn.Module, inputs: dict) -> Callable[[], torch.Tensor]:
    if name.startswith("plain"):
        return functools.partial(plain_forward, model, **inputs)
    return lambda: model(**inputs).sample


@torch.no_grad()
def forward_step(forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    return [forward()]


def training_step(model: nn.Module, forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """The gradients. Without an optimizer, whose cost depends on the number of weights alone."""
    model.zero_grad(set_to_none=True)
    forward().float().square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class CapturedStep:
    """
    A step as a CUDA graph: a call replays it. Graphs that are never replayed at the same time may share a pool of
    memory, and have to share the stream then.
    """

    def __init__(self, step: Step, model: nn.Module, stream: torch.cuda.Stream, pool: tuple[int, int]):
        self.step = step  # has buffers that the graph uses
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # which the backward pass takes over from the forward pass
            for _ in range(WARM_UP_RUNS):
                expected = step()
            # No gradient may be there yet: the captured backward pass makes its own, in the graph's pool, and each
            # replay writes them anew. (The step's own `zero_grad` has nothing to do then.)
            model.zero_grad(set_to_none=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.results = step()
            model.zero_grad(set_to_none=True)  # `results` keeps them; another graph of the same model has its own
        torch.cuda.synchronize()
        self()  # the first replay also uploads the graph
        if expected and not relative_error(self.results, expected) < TOLERANCE[expected[0].dtype]:
            raise ParityError("The CUDA graph of a step does not give what the step itself gives.")

    def __call__(self) -> None:
        self.graph.replay()


def record_products(model: nn.Module, inputs: dict, leaves_out_padding: bool) -> Callable[[bool], None]:
    """
    The matrix products of a model's linears, at the shapes that they have for `inputs`, and nothing else: no bias, no
    allocation (but for packed weights). In training also those of the gradients. Some models leave out padding of the
    text.
    """
    linears: list[tuple[nn.Module, int]] = []  # and the number of rows
    # Recorded where nothing is computed and every linear is called: kernels and fused steps use weights on their own.
    with torch.device("meta"):
        shadow = type(model).from_config(model.config).to(model.dtype)

    def record(name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        linears.append((model.get_submodule(name), output[..., 0].numel()))

    for name, module in shadow.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(functools.partial(record, name))
    if leaves_out_padding:
        text, mask = without_padding(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        inputs = inputs | {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    with torch.no_grad():
        shadow(**tree_map(lambda x: x if x is None else x.to("meta"), inputs))

    @functools.cache
    def buffer(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=model.dtype, device=model.device)

    @torch.no_grad()
    def run(training: bool) -> None:
        for linear, rows in linears:
            if isinstance(linear, PackedLinear):
                # It has no result to write to; slab by slab at least none is new to the process.
                for slab in buffer(rows, linear.in_features).split(TOKENS):
                    linear(slab)
                continue
            weight = linear.weight.detach()
            tokens, output = buffer(rows, weight.shape[1]), buffer(rows, weight.shape[0])
            torch.mm(tokens, weight.T, out=buffer(rows, weight.shape[0], 1)[..., 0])
            if training:
                torch.mm(output, weight, out=buffer(rows, weight.shape[1], 1)[..., 0])
                torch.mm(output.T, tokens, out=buffer(*weight.shape, 1)[..., 0])

    return run


def relative_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative L2 distance of all numbers together."""
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in zip(actual, expected, strict=True))
    return (difference / sum(b.double().square().sum().item() for b in expected)) ** 0.5


def check_parity(name: str, model: nn.Module, reference: nn.Module, inputs: dict, training: bool) -> float:
    """
    The error against the plain computation on the weights of `reference`: of the output, and in training, where both
    are one model, of all gradients too.
    """

    def numbers(forward: Callable[[], torch.Tensor]) -> list[list[torch.Tensor]]:
        if not training:
            with torch.no_grad():
                return [[forward()]]
        model.zero_grad(set_to_none=True)
        output = forward()
        output.float().square().mean().backward()
        return [[output.detach()], [parameter.grad for parameter in model.parameters()]]

    expected, actual = numbers(runner("plain", reference, inputs)), numbers(runner(name, model, inputs))
    model.zero_grad(set_to_none=True)
    error = max(relative_error(ours, plain) for ours, plain in zip(actual, expected))
    tolerance = TOLERANCE[inputs["hidden_states"].dtype]
    if not error < tolerance:
        raise ParityError(f"{name} differs from the plain computation by {error:.1e}, more than {tolerance:.0e}.")
    return error


def timed(run: Callable[[], object], args: argparse.Namespace) -> float:
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.device.type != "cpu":
        torch.accelerator.synchronize()
    start = clock()
    run()
    if args.device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Tensor memory that a run needs at most on top of what was there before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measure(height: int, width: int, batch_size: int, mode: str, args: argparse.Namespace) -> list[dict]:
    """One row for each model."""
    training = mode == "training"
    inputs = make_inputs(height, width, batch_size, args.device, args.dtype)
    steps: dict[str, Step] = {}  # each model, and the products of each architecture
    rows: list[dict] = []
    if args.cuda_graph:
        capture = functools.partial(CapturedStep, stream=torch.cuda.Stream(), pool=torch.cuda.graph_pool_handle())
    for name in args.models:
        log(f"{height} x {width}, batch {batch_size}, {mode}: {name}")
        model = make_model(name, args.layers, args.device, args.dtype)
        if args.compile:
            compile_model(model, len(args.sizes) * len(args.batches))
        error = None
        if name not in PIXART_LAYERS:
            weights = plain_model(name) if name.startswith(("packed", "cpu")) else name
            reference = make_model(weights, args.layers, args.device, args.dtype)
            error = check_parity(name, model, reference, inputs, training)
        forward = runner(name, model, inputs)
        step = (
            functools.partial(training_step, model, forward) if training else functools.partial(forward_step, forward)
        )
        if error is None and args.device.type == "cuda":
            step()  # the others ran before; what is compiled and allocated once is no part of a step's memory
        model.zero_grad(set_to_none=True)  # nor are gradients of earlier tables
        rows.append(
            {
                "model": name,
                "height": height,
                "width": width,
                "batch_size": batch_size,
                "mode": mode,
                "parity_error": error,
                "peak_bytes": peak_bytes(step, args.device),
            }
        )
        steps[name] = capture(step, model) if args.cuda_graph else step
        products = f"{architecture(name, args.dtype)} products"
        if products not in steps:
            leaves_out_padding = (
                isinstance(model, LocalDiTTransformer2DModel)
                and not (training or args.compile)
                and args.device.type == "cpu"
            )
            step = functools.partial(record_products(model, inputs, leaves_out_padding), training)
            steps[products] = capture(step, model) if args.cuda_graph else step

    log("timing")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.runs):
        for name, step in steps.items():
            scale = 1 if args.layers is None else full_depth(name.removesuffix(" products")) / args.layers
            seconds[name].append(scale * timed(step, args))
            log(f"{name}: {seconds[name][-1]:.4g} s")
    for row in rows:
        own = seconds[row["model"]]
        row |= {"seconds": own, "median": statistics.median(own)}
        for ratio, other in (
            ("times_pixart", BASELINE),
            ("times_plain", plain_model(row["model"])),
            ("share_of_floor", f"{architecture(row['model'], args.dtype)} products"),
        ):
            if other in seconds and other != row["model"]:
                row[ratio] = statistics.median(theirs / ours for theirs, ours in zip(seconds[other], own))
    return rows


def markdown(rows: list[dict]) -> str:
    def cell(row: dict, name: str, form: str) -> str:
        return form.format(row[name]) if row.get(name) is not None else ""

    lines = [
        "| size | batch | mode | model | median s | min to max s | times PixArt | times plain | share of the floor |"
        " peak MiB | error |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [
            f"{row['height']} x {row['width']}",
            str(row["batch_size"]),
            row["mode"],
            row["model"],
            f"{row['median']:.4g}",
            f"{min(row['seconds']):.4g} to {max(row['seconds']):.4g}",
            cell(row, "times_pixart", "{:.2f}"),
            cell(row, "times_plain", "{:.2f}"),
            cell(row, "share_of_floor", "{:.2f}"),
            f"{row['peak_bytes'] / 2**20:.0f}",
            cell(row, "parity_error", "{:.0e}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """
    Times PixArt: a panel for each mode, a group of bars for each size and batch. If a case occurs twice, its last row
    counts.
    """
    from matplotlib.figure import Figure

    def group(row: dict) -> tuple[int, int, int, int]:
        return row["height"] * row["width"], row["height"], row["width"], row["batch_size"]

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    models = {mode: list(dict.fromkeys(row["model"] for row in rows if row["mode"] == mode)) for mode in modes}
    groups = {mode: sorted({group(row) for row in rows if row["mode"] == mode}) for mode in modes}
    width = max(6, *(0.3 * len(models[mode]) * len(groups[mode]) for mode in modes))
    figure = Figure(figsize=(width, 3.4 * len(modes)), layout="constrained")
    for mode, axes in zip(modes, figure.subplots(len(modes), squeeze=False)[:, 0]):
        for i, model in enumerate(models[mode]):
            bars = {
                groups[mode].index(group(row)): row.get("times_pixart", 1.0)
                for row in rows
                if (row["model"], row["mode"]) == (model, mode)
            }
            bar_width = 0.9 / len(models[mode])
            places = [place + (i - (len(models[mode]) - 1) / 2) * bar_width for place in bars]
            labels = axes.bar(places, list(bars.values()), bar_width, label=model)
            axes.bar_label(labels, fmt="{:.2f}", fontsize=7)
        axes.set_xticks(range(len(groups[mode])), [f"{h} x {w}\nbatch {b}" for _, h, w, b in groups[mode]])
        axes.set_title("forward pass" if mode == "forward" else "training step")
        axes.set_ylabel(f"times as fast as {BASELINE}")
        axes.margins(x=0.01, y=0.25)
        axes.legend(fontsize=8, loc="upper left", ncols=len(models[mode]))
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> None:
    earlier = [row for path in args.earlier for row in json.loads(path.read_text().splitlines()[-1])["rows"]]
    rows = []
    for height, width in args.sizes:
        for batch_size in args.batches:
            for mode in args.modes:
                rows += measure(height, width, batch_size, mode, args)
                if args.cuda_graph:
                    torch.cuda.empty_cache()  # the graphs of the table are gone: their pool too
                print(markdown(rows[-len(args.models) :]), flush=True)
    if args.plot is not None:
        plot(earlier + rows, args.plot)
    settings = {"layers": args.layers, "cpu_time": args.cpu_time, "dtype": str(args.dtype), "device": str(args.device)}
    settings |= {"compile": args.compile, "cuda_graph": args.cuda_graph}
    print(json.dumps({**settings, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}))


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    default_models = [BASELINE, "pixart-18", "plain-global", "localdit-global", "localdit-folded"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default_models)
    sizes = [parse_size(size) for size in ("512", "768x1024", "1024", "2048")]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=sizes, help="pixels: HEIGHTxWIDTH or SIDE")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of all but the plain models")
    parser.add_argument("--cuda-graph", action="store_true", help="time the replays of CUDA graphs")
    parser.add_argument("--layers", type=int, help="layers to run in place of all")
    parser.add_argument("--runs", type=int, help="5 by default, 20 on a GPU")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, for a machine that others use too"
    )
    parser.add_argument("--device", type=torch.device, default=torch.accelerator.current_accelerator() or "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--plot", type=Path, help="picture to write (needs matplotlib)")
    parser.add_argument("--earlier", nargs="+", type=Path, default=[], help="outputs of runs to plot as well")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    on_gpu = args.device.type == "cuda"
    if args.cuda_graph and not on_gpu:
        parser.error(f"--cuda-graph needs a CUDA device, not {str(args.device)!r}")
    packed = any(name.startswith("packed") for name in args.models)
    if packed and (reason := why_not_packed(args.device, args.dtype)):
        parser.error(reason)
    kernels = any(name.startswith("cpu") for name in args.models)
    if kernels and (reason := why_not_cpu(args.device, args.dtype)):
        parser.error(reason)
    for_inference = packed or kernels
    if for_inference and ("training" in args.modes or args.compile):
        parser.error("packed weights and CPU kernels are for inference: give --modes forward, and no --compile")
    args.runs = args.runs or (20 if on_gpu else 5)
    if args.cpu_time:
        torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    try:
        main(parse_args())
    except ParityError as error:
        sys.exit(str(error))
