"""
One compiled graph serves all shifts, steps and sizes. `aot_eager` traces fully without compiling C++; `eager` stops
before the operators are taken apart, which takes most of the time.
"""

import pytest
import torch
from transformer_inputs import random_inputs, relative_error, tiny_transformer

from diffusers_localdit import transformer_localdit
from diffusers_localdit.transformer_localdit import LocalDiTCrossAttention, LocalDiTStepCache

# Height, width and text tokens: square and not, windows that fit and not, one of the sizes turned round.
SIZES = [(16, 16, 7), (16, 24, 7), (24, 16, 7), (20, 12, 9), (32, 32, 12), (18, 26, 5), (40, 16, 7)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    """Two steps at each size, with a cache for what does not change between them, as pipelines have one."""
    samples = []
    for height, width, text_tokens in SIZES:
        cache, inputs = LocalDiTStepCache(), random_inputs(height, width, text_tokens=text_tokens)
        for step in range(2):
            new = random_inputs(height, width, text_tokens=text_tokens, seed=step)
            inputs |= {name: new[name] for name in ("hidden_states", "timestep")}
            samples.append(model(**inputs, step_cache=cache).sample)
    return samples


def assert_close(compiled, eager):
    for actual, expected in zip(outputs(compiled), outputs(eager), strict=True):
        assert relative_error(actual, expected) < 1e-5


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_repeated_blocks_share_one_graph(backend):
    torch._dynamo.utils.counters.clear()
    model = tiny_transformer()
    model.compile_repeated_blocks(fullgraph=True, backend=backend, dynamic=True)
    assert_close(model, tiny_transformer())
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_model_is_one_graph(backend):
    torch._dynamo.utils.counters.clear()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        model = tiny_transformer(num_layers=2)
        assert_close(torch.compile(model, fullgraph=True, backend=backend, dynamic=True), model)
    assert graphs() == 1


def test_training_compiles_with_queries_in_parts(monkeypatch):
    """Cross-attention as on a GPU: cut in one graph for numbers of tokens that eight divides, whole in another."""
    monkeypatch.setattr(
        transformer_localdit, "query_parts", lambda processor, query: 8 if query.shape[1] % 8 == 0 else 1
    )
    cut, counts = [], []

    def backend(graph, inputs):
        cut.append("repeat_interleave" in graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.manual_seed(0)
    attn = LocalDiTCrossAttention(24, heads=2)
    compiled = torch.compile(attn, fullgraph=True, backend=backend, dynamic=True)
    text, bias = torch.randn(2, 7, 24), torch.zeros(2, 1, 1, 7)
    bias[1, ..., 3:] = transformer_localdit.MASK_VALUE
    for tokens in (64, 96, 117):
        hidden_states, gradients = torch.randn(2, tokens, 24), []
        for forward in (compiled, attn):
            leaves = [x.clone().requires_grad_() for x in (hidden_states, text)]
            attn.zero_grad()
            forward(*leaves, bias).square().mean().backward()
            gradients.append([x.grad for x in (*attn.parameters(), *leaves)])
        least = 0.1 * max(x.norm() for x in gradients[1])
        for actual, expected in zip(*gradients, strict=True):
            assert (actual - expected).norm() < 1e-5 * max(expected.norm(), least)
        counts.append(len(cut))
    assert cut[0] and not cut[-1]
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.slow
def test_checkpointed_blocks_compile_with_sizes_that_vary():
    model = tiny_transformer(num_layers=2)
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="eager", dynamic=True)
    inputs = random_inputs()
    expected = model(**inputs).sample
    output = compiled(**inputs).sample
    assert relative_error(output, expected) < 1e-6
    output.sum().backward()  # runs the blocks again


@torch.no_grad()
def test_exported_it_takes_any_batch_and_text():
    batch, text = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("text", min=2, max=300)
    shapes = {
        "hidden_states": {0: batch},
        "encoder_hidden_states": {0: batch, 1: text},
        "timestep": {0: batch},
        "added_cond_kwargs": {"resolution": {0: batch}, "aspect_ratio": {0: batch}},
        "encoder_attention_mask": {0: batch, 1: text},
    }
    model = tiny_transformer(num_layers=1)
    program = torch.export.export(model, (), random_inputs(batch_size=3), dynamic_shapes=shapes, strict=False)
    others = random_inputs(batch_size=5, text_tokens=9)
    assert relative_error(program.module()(**others).sample, model(**others).sample) < 1e-6
