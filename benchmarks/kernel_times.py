"""
Every kernel of `diffusers_localdit.kernels` alone, as the self-attention of the released model calls it: the local
branch, the same with the maps that the context branch reads, the context branch's attention, the convolution of a
query stage, and the backward passes of these; and a whole query stage, product included, as it is without gradients.
Windows of 4 x 4 are served by CUDA kernels where they can be; the rows "triton" are of the Triton kernels in their
place.

Each row says which share of the device's copy rate, measured in the same run, a kernel reaches when it is charged with
reading its inputs and writing its outputs once. Times are of CUDA graphs, as in `window_attention.py`. The last line
is JSON. (That the kernels are right is for `tests/kernel_checks.py` to say.)
"""

import argparse
import json
import statistics
from functools import partial
from unittest.mock import patch

import torch
from window_attention import (
    EPS,
    SETS,
    Calls,
    CapturedCalls,
    Clock,
    Problem,
    add_sizes,
    device_name,
    take_turns,
)

from diffusers_localdit.kernels import ops, query_stage, window4, window_attention
from diffusers_localdit.kernels.window_attention import Preparation


def kernels(problem: Problem) -> dict:
    """Name: how many tensors of the tokens' size are read and written, and a function of seven such tensors."""
    p, geometry = problem, problem.geometry
    ready = Preparation(p.norm_q, p.norm_k, *p.rotary, EPS)
    rest = (p.bias_table, geometry.map_to_token, geometry.token_to_window, p.window_size, 0.5)
    map_shape = (p.shape[0], *geometry.map_to_token.shape, p.shape[2])
    width = p.shape[2]
    convolution, squeeze, excite = p.random(width, 1, 3, 3), p.random(width // 4, width), p.random(width, width // 4)
    pointwise = p.random(width, width) * 1e-6  # so small that the map stays as it is, run after run
    forward, backward = window_attention.forward, window_attention.backward

    def on_map(*tokens):
        return [x[:, : geometry.map_to_token.numel()] for x in tokens]

    return {
        "local": (4, lambda q, k, v, *_: forward(q, k, v, ready, *rest)),
        "local with maps": (6, lambda q, k, v, *_: forward(q, k, v, ready, *rest, with_maps=True)),
        "context": (5, lambda q, k, v, g, *m: forward(*on_map(*m), None, *rest, residual=g)),
        "query stage": (2, lambda q, k, v, g, m, *_: query_stage.forward(m.view(map_shape), convolution)),
        "whole query stage": (
            2,
            lambda q, k, v, g, m, *_: ops.query_stage_(m.view(map_shape), convolution, squeeze, excite, pointwise),
        ),
        "local, backward": (7, lambda q, k, v, g, *_: backward(g, None, None, q, k, v, ready, *rest)),
        "local with maps, backward": (
            9,
            lambda q, k, v, g, m, n, _: backward(g, m.view(map_shape), n.view(map_shape), q, k, v, ready, *rest),
        ),
        "context, backward": (7, lambda q, k, v, g, *m: backward(g, None, None, *on_map(*m), None, *rest)),
        "query stage, backward": (
            3,
            lambda q, k, v, g, m, n, _: query_stage.backward(
                m.view(map_shape), g[:, 0].contiguous(), n.view(map_shape), convolution
            ),
        ),
    }


def without_cuda_kernels(function):
    def call(*arguments):
        with patch.object(window4, "may_launch", lambda tensor: False):
            return function(*arguments)

    return call


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    problem = Problem(args)
    on_gpu = problem.device.type == "cuda"
    places = problem.geometry.map_to_token.numel()
    sets = [
        [*problem.inputs(), problem.random(*problem.shape)]
        + [problem.random(problem.shape[0], places, problem.shape[2]) for _ in range(3)]
        for _ in range(SETS)
    ]
    clock = Clock(problem)
    make_calls = partial(CapturedCalls, stream=torch.cuda.Stream()) if on_gpu else Calls
    functions = kernels(problem)
    calls = {(name, "default"): make_calls(run, "forward", sets, None) for name, (_, run) in functions.items()}
    calls |= {
        (name, "triton"): make_calls(without_cuda_kernels(run), "forward", sets, None)
        for name, (_, run) in functions.items()
        if "query stage" not in name
    }
    copy_rate, seconds = take_turns(calls, clock, args.runs)
    tensor_bytes = sets[0][3].nbytes
    rows = []
    for (name, kind), times in seconds.items():
        median = statistics.median(times)
        share = functions[name][0] * tensor_bytes / median / copy_rate
        rows.append({"kernel": name, "kind": kind, "us": round(median * 1e6, 1), "share": round(share, 3)})
        print("{kernel:>26} {kind:>8} {us:10.1f} us {share:7.3f}".format(**rows[-1]))
    settings = {"cuda_kernels": window4.may_launch(sets[0][0]), "torch": torch.__version__}
    rates = {"device": device_name(problem.device), "copy_gb_per_s": round(copy_rate / 1e9, 1)}
    print(json.dumps({**rates, **settings, "rows": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    main(parser.parse_args())
