"""Window attention against a loop over windows, tokens looked up one by one from the description of the original."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_inputs import relative_error

from diffusers_localdit.transformer_localdit import (
    GlobalContextQueryStage,
    LocalDiTWindowAttention,
    rotary_table,
    to_windows,
    window_geometry,
)

HEADS, HEAD_DIM = 2, 8
DIM = HEADS * HEAD_DIM
CPU = torch.device("cpu")


def random_attention(window_size: int, use_global_context: bool) -> LocalDiTWindowAttention:
    torch.manual_seed(window_size)
    attn = LocalDiTWindowAttention(DIM, HEADS, window_size, use_global_context)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn.double()


def naive_rotary(token: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """One token (heads, head_dim), pair by pair."""
    turned = torch.empty_like(token)
    for pair in range(HEAD_DIM // 2):
        position, j = (column, pair) if pair < HEAD_DIM // 4 else (row, pair - HEAD_DIM // 4)
        angle = position * 10000.0 ** (-4 * j / HEAD_DIM)
        a, b = token[:, 2 * pair], token[:, 2 * pair + 1]
        turned = turned.index_copy(
            1,
            torch.tensor([2 * pair, 2 * pair + 1]),
            torch.stack([a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)], dim=1),
        )
    return turned


def naive_query_stage(stage: GlobalContextQueryStage, query_map: torch.Tensor) -> torch.Tensor:
    """The stage on a (C, Hp, Wp) map, with a GELU written out by its error function."""

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    features = gelu(F.conv2d(query_map[None], stage.depthwise.weight, padding=1, groups=DIM)[0])
    squeezed = features.sum(dim=(1, 2)) / features[0].numel()
    gate = 1 / (1 + torch.exp(-(stage.excite.weight @ gelu(stage.squeeze.weight @ squeezed))))
    return query_map + torch.einsum("oc,chw->ohw", stage.pointwise.weight, features * gate[:, None, None])


def naive_attention(attn, hidden_states, height, width, window_size, shift, use_rope):
    """One picture (L, C) through the steps that the original takes, window by window and query by query."""
    w = window_size
    padded_height, padded_width = -(-height // w) * w, -(-width // w) * w

    def project(linear, norm=None):
        tokens = linear(hidden_states).unflatten(-1, (HEADS, HEAD_DIM))
        if norm is not None:
            tokens = tokens / (tokens.pow(2).mean(-1, keepdim=True) + 1e-10).sqrt() * norm.weight
            if use_rope:
                tokens = torch.stack([naive_rotary(t, i // width, i % width) for i, t in enumerate(tokens)])
        token_map = tokens.unflatten(0, (height, width))
        token_map = F.pad(token_map, (0, 0, 0, 0, 0, padded_width - width, 0, padded_height - height))
        return token_map.roll((-shift, -shift), dims=(0, 1))  # (Hp, Wp, heads, head_dim)

    query, key, value = project(attn.to_q, attn.norm_q), project(attn.to_k, attn.norm_k), project(attn.to_v)

    def region(position, length):
        return 0 if shift == 0 or position < length - w else (1 if position < length - shift else 2)

    def attend(query, key, value, table):
        output = torch.zeros_like(value)
        for top in range(0, padded_height, w):
            for left in range(0, padded_width, w):
                places = [(top + y, left + x) for y in range(w) for x in range(w)]
                for qy, qx in places:
                    scores = []
                    for ky, kx in places:
                        score = (query[qy, qx] * key[ky, kx]).sum(-1) / math.sqrt(HEAD_DIM)
                        score = score + table[(qy - ky + w - 1) * (2 * w - 1) + (qx - kx + w - 1)]
                        same = region(qy, padded_height) == region(ky, padded_height)
                        same = same and region(qx, padded_width) == region(kx, padded_width)
                        scores.append(score if same else score - 10000.0)
                    weights = torch.stack(scores).softmax(0)  # (w*w, heads)
                    mixed = torch.stack([value[y, x] for y, x in places])  # (w*w, heads, head_dim)
                    output[qy, qx] = (weights[..., None] * mixed).sum(0)
        return output

    output = attend(query, key, value, attn.rel_pos_bias)
    if attn.global_context is not None:
        context = attn.global_context
        query_map = query.flatten(2).permute(2, 0, 1)
        for stage in context.query_stages:
            query_map = naive_query_stage(stage, query_map)
        context_query = query_map.permute(1, 2, 0).unflatten(-1, (HEADS, HEAD_DIM))
        context_key = context.to_k(key.flatten(2)).unflatten(-1, (HEADS, HEAD_DIM))
        context_value = context.to_v(key.flatten(2)).unflatten(-1, (HEADS, HEAD_DIM))
        output = (output + attend(context_query, context_key, context_value, context.rel_pos_bias)) / 2
    output = output.roll((shift, shift), dims=(0, 1))[:height, :width].reshape(height * width, DIM)
    return attn.to_out[0](output) + hidden_states


@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    window_size=st.integers(2, 4),
    layer=st.integers(0, 5),
    use_global_context=st.booleans(),
    use_rope=st.booleans(),
)
@settings(max_examples=12, derandomize=True)
def test_equals_a_loop_over_windows(height, width, window_size, layer, use_global_context, use_rope):
    attn = random_attention(window_size, use_global_context)
    shift = layer % window_size
    rotary = rotary_table(height, width, HEAD_DIM, CPU) if use_rope else (None, None)
    geometry = window_geometry(height, width, window_size, shift, rotary, CPU)
    x = torch.randn(2, height * width, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    target = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(layer + 1))

    def output_and_gradients(function):
        inputs = x.clone().requires_grad_()
        attn.zero_grad()
        output = function(inputs)
        (output * target).sum().backward()
        return [output.detach(), inputs.grad, *(parameter.grad.clone() for parameter in attn.parameters())]

    actual = output_and_gradients(lambda inputs: attn(inputs, geometry))
    expected = output_and_gradients(
        lambda inputs: torch.stack(
            [naive_attention(attn, picture, height, width, window_size, shift, use_rope) for picture in inputs]
        )
    )
    # The rotary table and the variance of the norm are float32.
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item() + 1e-9)


@given(height=st.integers(1, 40), width=st.integers(1, 40), window_size=st.integers(1, 9), shift=st.integers(0, 8))
@settings(max_examples=100)
def test_every_token_has_one_place(height, width, window_size, shift):
    geometry = window_geometry(height, width, window_size, shift % window_size, (None, None), CPU)
    tokens = torch.arange(height * width)
    assert torch.equal(geometry.window_to_token.flatten()[geometry.token_to_window], tokens)
    padding = geometry.map_to_token.numel() - tokens.numel()
    assert (geometry.map_to_token == height * width).sum() == geometry.padding.sum() == padding
    windows = to_windows(geometry.map_to_token, window_size)
    assert torch.equal(windows.clamp(max=height * width - 1), geometry.window_to_token)
    assert torch.equal(windows == height * width, geometry.padding)


def test_single_window_keeps_the_shift():
    # Unlike Swin, which drops it: a 4 x 4 map in windows of 4 is rolled and masked in the layers with a shift.
    geometry = window_geometry(4, 4, 4, 1, (None, None), CPU)
    assert geometry.map_to_token[0, 0] == 5
    assert geometry.attention_mask.min() == -10000.0


def test_norm_has_the_original_epsilon():
    # 1e-10 keeps values of magnitude 1e-4 at unit size; the usual 1e-6 would shrink them to 0.1.
    attn = random_attention(4, False)
    attn.norm_q.weight.data.fill_(1.0)
    tiny = torch.full((1, 1, HEADS, HEAD_DIM), 1e-4, dtype=torch.float64)
    normed = attn.norm_q(tiny)
    torch.testing.assert_close(normed, torch.full_like(tiny, 1 / math.sqrt(1.01)), rtol=1e-6, atol=0)


def test_query_stage_uses_exact_gelu():
    torch.manual_seed(0)
    stage = GlobalContextQueryStage(DIM).double()
    query_map = torch.randn(1, 4, 4, DIM, dtype=torch.float64)
    expected = naive_query_stage(stage, query_map[0].permute(2, 0, 1)).permute(1, 2, 0)[None]
    assert relative_error(stage([query_map])[0], expected) < 1e-12


@pytest.mark.parametrize("layer, shift", [(0, 0), (3, 3), (4, 0), (6, 2)])
def test_shift_is_the_layer_modulo_the_window(layer, shift, monkeypatch):
    from transformer_inputs import random_inputs, tiny_transformer

    model = tiny_transformer(num_layers=7)
    seen = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(args[4].map_to_token[0, 0].item()))
    with torch.no_grad():
        model(**random_inputs())
    assert seen[layer] == shift * 8 + shift  # the token at the corner of the rolled 8 x 8 map


def test_a_wholly_masked_text_is_averaged():
    # -10000 leaves a softmax over equally masked tokens; -inf would give NaN, and ignoring the mask another mixture.
    from transformer_inputs import random_inputs, tiny_transformer

    model, inputs = tiny_transformer(), random_inputs()
    inputs["encoder_attention_mask"] = torch.zeros_like(inputs["encoder_attention_mask"])
    with torch.no_grad():
        masked = model(**inputs).sample
        inputs["encoder_attention_mask"] = None
        unmasked = model(**inputs).sample
    assert masked.isfinite().all()
    assert relative_error(masked, unmasked) < 1e-3  # float32 rounds scores near -10000 to 1e-3
