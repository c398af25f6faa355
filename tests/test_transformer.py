"""What the whole transformer must hold, whatever its weights."""

import copy
import gc
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import LayerSkipConfig, PyramidAttentionBroadcastConfig, apply_layer_skip
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils import is_peft_available
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from transformer_inputs import in_dtype, map_tensors, random_inputs, relative_error, tiny_transformer

from diffusers_localdit import LocalDiTTransformer2DModel, transformer_localdit
from diffusers_localdit.transformer_localdit import (
    MASK_VALUE,
    QK_NORM_EPS,
    LocalDiTCrossAttnProcessor,
    LocalDiTFeedForward,
    LocalDiTRMSNorm,
    LocalDiTWindowAttention,
    LocalDiTWindowAttnProcessor,
    apply_rotary,
    attention,
    cached_token_map_geometry,
    explicit_attention,
    gelu_tanh_,
    is_plain,
    may_fuse_gelu,
    modulate,
    pad_keys,
    query_parts,
    rotary_table,
    token_map_geometry,
    without_padding,
)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.fixture
def uninitialized_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@given(height=st.integers(1, 14), width=st.integers(1, 14))
@settings(max_examples=20)
@torch.no_grad()
def test_any_size_keeps_its_shape(model, height, width):
    inputs = random_inputs(2 * height, 2 * width, batch_size=1)
    sample = model(**inputs).sample
    assert sample.shape == (1, 4, 2 * height, 2 * width)
    assert sample.isfinite().all()


@torch.no_grad()
def test_a_size_does_not_leak_into_its_transpose(model):
    # The original caches its rotary table by the number of tokens alone.
    cached_token_map_geometry.cache_clear()
    tall, wide = random_inputs(24, 16), random_inputs(16, 24)
    model(**tall)
    after = model(**wide).sample
    cached_token_map_geometry.cache_clear()
    assert torch.equal(model(**wide).sample, after)


@torch.no_grad()
def test_batch_mates_do_not_matter(model):
    inputs = random_inputs(20, 12, batch_size=5)
    together = model(**inputs).sample
    for i in range(5):
        alone = model(**map_tensors(lambda tensor, i=i: tensor[i : i + 1], inputs)).sample
        assert relative_error(alone, together[i : i + 1]) < 1e-5


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model = tiny_transformer().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sample = model(**random_inputs()).sample
        sample.square().mean().backward()
        results.append([sample.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, checkpointed in zip(*results):
        assert torch.equal(plain, checkpointed)


def test_every_parameter_gets_a_gradient(model):
    model.zero_grad()
    model(**random_inputs()).sample.square().mean().backward()
    dead = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert dead == []
    model.zero_grad()


def test_save_and_load_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    public = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: loaded.config[name] for name in public} == public
    with torch.no_grad():
        assert torch.equal(loaded(**random_inputs()).sample, model(**random_inputs()).sample)


def test_from_config(model, tmp_path):
    model.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rebuilt = LocalDiTTransformer2DModel.from_config(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == shapes


@torch.no_grad()
def test_large_inputs_do_not_overflow_in_half_precision(model):
    inputs = random_inputs()
    inputs["hidden_states"] = 30 * inputs["hidden_states"].sign()
    inputs["encoder_hidden_states"] = 30 * inputs["encoder_hidden_states"].sign()
    expected = model(**inputs).sample
    half = tiny_transformer().half()
    added = inputs.pop("added_cond_kwargs")
    inputs = in_dtype(torch.float16, inputs)
    assert relative_error(half(**inputs, added_cond_kwargs=added).sample, expected) < 2e-2


@torch.no_grad()
def test_fused_projections_change_nothing(model):
    expected = model(**random_inputs()).sample
    model.fuse_qkv_projections()
    assert "transformer_blocks.0.attn.to_qkv.weight" in model.state_dict()
    assert "transformer_blocks.0.cross_attn.to_kv.weight" in model.state_dict()
    fused = model(**random_inputs()).sample
    model.unfuse_qkv_projections()
    assert relative_error(fused, expected) < 1e-6
    assert torch.equal(model(**random_inputs()).sample, expected)


class DoublingProcessor(LocalDiTWindowAttnProcessor):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


@torch.no_grad()
def test_processors_are_set_on_self_attention_and_replaced(model):
    expected = model(**random_inputs()).sample
    original = dict(model.attn_processors)
    assert len(original) == 2 * len(model.transformer_blocks)

    model.set_attn_processor(DoublingProcessor())
    kinds = {name: type(processor) for name, processor in model.attn_processors.items()}
    doubled = {name for name, kind in kinds.items() if kind is DoublingProcessor}
    assert doubled == {f"transformer_blocks.{i}.attn.processor" for i in range(len(model.transformer_blocks))}
    assert relative_error(model(**random_inputs()).sample, expected) > 1e-3

    model.set_attn_processor(original)
    assert torch.equal(model(**random_inputs()).sample, expected)


@pytest.mark.parametrize("backend", ["_native_math", "native"])
@torch.no_grad()
def test_attention_backends_agree(model, backend, monkeypatch):
    expected = model(**random_inputs()).sample
    backends = []

    def dispatched(query, *arguments, **settings):
        backends.append(settings["backend"])
        return dispatch_attention_fn(query, *arguments, **settings)

    monkeypatch.setattr(transformer_localdit, "dispatch_attention_fn", dispatched)
    model.set_attention_backend(backend)
    actual = model(**random_inputs()).sample
    model.reset_attention_backend()
    assert relative_error(actual, expected) < 1e-5
    # Windows, for which a CPU has a faster way by default, the global branch's, and the text.
    branches = 2 if model.config.use_global_context else 1
    assert backends == [AttentionBackendName(backend)] * (branches + 1) * len(model.transformer_blocks)


@torch.no_grad()
def test_geometry_is_built_once_per_size_and_not_kept_without_bound(model):
    cached_token_map_geometry.cache_clear()
    for _ in range(3):
        model(**random_inputs(16, 16))
        model(**random_inputs(16, 24))
    assert cached_token_map_geometry.cache_info().misses == 2
    for width in range(2, 60, 2):
        model._geometry(4, width, torch.device("cpu"))
    info = cached_token_map_geometry.cache_info()
    assert info.currsize == info.maxsize <= 8


def test_geometry_of_inference_mode_serves_training(model):
    cached_token_map_geometry.cache_clear()
    with torch.inference_mode():
        model(**random_inputs())
    model(**random_inputs()).sample.sum().backward()
    model.zero_grad()


def test_geometry_of_fake_tensors_serves_nobody_else():
    cached_token_map_geometry.cache_clear()
    model, inputs = tiny_transformer(num_layers=1), random_inputs()
    for _ in range(2):  # before a call on real tensors, and after it
        traced = make_fx(
            lambda latents: model(**{**inputs, "hidden_states": latents}).sample,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(inputs["hidden_states"])
        output = model(**inputs).sample
        assert type(output) is torch.Tensor
        assert relative_error(traced(inputs["hidden_states"]), output) < 1e-6


def test_gradients_of_each_sample_by_vmap():
    model, inputs = tiny_transformer(num_layers=1), random_inputs()
    names = ("encoder_hidden_states", "timestep", "encoder_attention_mask")
    sizes = {name: size[:1] for name, size in inputs["added_cond_kwargs"].items()}

    def loss(weights, latent, *others):
        others = {name: value[None] for name, value in zip(names, others)}
        others = {"hidden_states": latent[None], "added_cond_kwargs": sizes, **others}
        return functional_call(model, weights, (), others).sample.square().mean()

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    samples = inputs["hidden_states"], *(inputs[name] for name in names)
    gradients = vmap(grad(loss), in_dims=(None, *[0] * len(samples)))(weights, *samples)
    for i in range(2):
        expected = grad(loss)(weights, *(value[i] for value in samples))
        # All together: the bias of the keys, for one, has a gradient by rounding alone.
        actual = torch.cat([gradients[name][i].flatten() for name in weights])
        assert relative_error(actual, torch.cat([expected[name].flatten() for name in weights])) < 1e-5


@pytest.mark.parametrize("use_global_context", [True, False])
@pytest.mark.parametrize("height, width", [(16, 24), (20, 12)])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_slabs_change_nothing(use_global_context, height, width, device, monkeypatch):
    # 16 tokens at a time, of which each of the two samples has 8, less than a window.
    if device == "cpu":
        monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 16 * 24)
    else:
        monkeypatch.setattr(transformer_localdit, "saves_passes", lambda hidden_states: False)
        monkeypatch.setattr(transformer_localdit, "GPU_SLAB_NUMBERS", 16 * 24)
    model = tiny_transformer(use_global_context=use_global_context)
    inputs = random_inputs(height, width)
    whole = model(**inputs).sample
    widths, texts = [], []
    block = model.transformer_blocks[0]
    block.ff.net[0].proj.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape))
    block.cross_attn.to_k.register_forward_pre_hook(lambda module, args: texts.append(args[0].shape))
    with torch.no_grad():
        in_slabs = model(**inputs).sample
    assert widths == [(2, 8, 24)] * (height * width // 4 // 8) + [(2, 4, 24)] * (height * width // 4 % 8 > 0)
    assert len(texts) == 1  # once for all slabs
    assert relative_error(in_slabs, whole) < 1e-6


@torch.no_grad()
def test_slabs_leave_inputs_alone_and_hooks_see_whole_sequences(monkeypatch):
    """Results overwrite what nobody else has; hooks, accelerate's and those of diffusers' caches, count calls."""
    monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 16 * 24)
    model, inputs = tiny_transformer(), random_inputs()
    before = map_tensors(torch.clone, inputs)
    expected = model(**inputs).sample
    assert all(torch.equal(inputs[name], before[name]) for name in before if name != "added_cond_kwargs")
    shapes, kept = [], []

    class AcceleratesHook(ModelHook):
        def post_forward(self, module, output):
            shapes.append(output.shape)
            return output

    model.transformer_blocks[1].cross_attn.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    model.transformer_blocks[2].attn.register_forward_hook(lambda *args: kept.append((args[2], args[2].clone())))
    add_hook_to_module(model.transformer_blocks[0].ff, AcceleratesHook())
    assert relative_error(model(**inputs).sample, expected) < 1e-6
    assert shapes == [(2, 64, 24)] * 2
    assert torch.equal(*kept[0])

    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(-1, 1001),
        cross_attention_block_identifiers=(r"transformer_blocks.*\.cross_attn$",),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(config)
    for _ in range(2):  # computed, then all of it kept
        with model.cache_context("test"):
            assert relative_error(model(**inputs).sample, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-5, 0.0])
def test_norm_in_place_is_the_norm(magnitude, dtype, rtol):
    """Also where epsilon, 1e-10, is as large as the mean of the squares. Rounded once in half precision."""
    norm = LocalDiTRMSNorm(12, eps=QK_NORM_EPS)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = (magnitude * torch.randn(3, 5, 2, 12, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm.to(dtype)
    expected = F.rms_norm(x.double(), (12,), norm.weight.double(), QK_NORM_EPS)
    normed = norm(x)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), expected, rtol=rtol, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype, step", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_norm_and_rotary_embedding_are_rounded_once(dtype, step):
    torch.manual_seed(0)
    attn = LocalDiTWindowAttention(48, 2, window_size=4, use_global_context=False)
    torch.nn.init.uniform_(attn.norm_q.weight, 0.5, 2.0)
    attn.to(dtype)
    geometry = token_map_geometry(8, 12, 48, 24, 4, True, 8, 1.0, torch.device("cpu")).shifts[1]
    x = torch.randn(2, 96, 48).to(dtype)
    processor = LocalDiTWindowAttnProcessor
    query, _, _ = processor._prepare(attn, *processor._project(attn, x, geometry), geometry)
    windows = geometry.window_to_token.flatten()
    projected = attn.to_q(x[:, windows].unflatten(1, (-1, 16))).flatten(1, 2).double().unflatten(-1, (2, 24))
    normed = F.rms_norm(projected, (24,), attn.norm_q.weight.double(), QK_NORM_EPS)
    tables = (table[windows].double() for table in (geometry.rotary_cos, geometry.rotary_sin))
    torch.testing.assert_close(query.double(), apply_rotary(normed, *tables).view_as(query), rtol=step, atol=2e-6)


@torch.no_grad()
def test_norm_in_place_keeps_float32_with_a_weight_in_half_precision():
    norm = LocalDiTRMSNorm(12, eps=QK_NORM_EPS).bfloat16()
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    expected = F.rms_norm(x.double(), (12,), norm.weight.double(), QK_NORM_EPS)
    normed = norm(x)
    assert normed.dtype == torch.float32 and normed.data_ptr() == x.data_ptr()
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
def test_gelu_in_place_is_the_gelu(dtype, rtol):
    x = torch.linspace(-6, 6, 1000).reshape(1, 125, 8).to(dtype)  # more than once 64 rows
    expected = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu_tanh_(x).double(), expected, rtol=rtol, atol=1e-7)


@torch.no_grad()
def test_a_gelu_of_another_kind_is_not_left_out_on_a_gpu():
    class OwnGELU(GELU):
        pass

    tokens = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device=torch.device("cpu"))
    assert may_fuse_gelu(tokens, GELU(4, 8, approximate="tanh").bfloat16())
    assert not may_fuse_gelu(tokens, OwnGELU(4, 8, approximate="tanh").bfloat16())


def test_only_plain_linears_are_computed_from_their_weights():
    x, linear = torch.randn(2, 4), torch.nn.Linear(4, 4)
    assert is_plain(linear, x)
    assert not is_plain(linear, x.bfloat16())  # layerwise casting
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain(linear, x.bfloat16())
    assert not is_plain(linear, x.to("meta"))  # offloading
    assert not is_plain(type("Adapter", (torch.nn.Linear,), {})(4, 4), x)
    for register in (
        linear.register_forward_pre_hook,
        linear.register_forward_hook,
        linear.register_full_backward_pre_hook,
        linear.register_full_backward_hook,
    ):
        handle = register(lambda *arguments: None)
        assert not is_plain(linear, x)
        handle.remove()
        assert is_plain(linear, x)
    replaced = torch.nn.Linear(4, 4)
    replaced.forward = lambda x: x  # as some adapters do
    assert not is_plain(replaced, x)
    linear.weight = torch.nn.Parameter(torch.randn(4, 4).as_subclass(type("Int8", (torch.Tensor,), {})))
    assert not is_plain(linear, x)


@torch.no_grad()
def test_feed_forward_with_the_gelu_fused_into_the_linear(monkeypatch):
    """On a GPU the tanh approximation, on a CPU, where it is not used, the exact GELU, which it resembles."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    feed_forward = LocalDiTFeedForward(24, activation_fn="gelu-approximate").to(device, dtype)
    x = torch.randn(2, 5, 24, device=device, dtype=dtype)
    monkeypatch.setattr(transformer_localdit, "may_fuse_gelu", lambda *arguments: False)
    expected = feed_forward(x)
    monkeypatch.setattr(transformer_localdit, "may_fuse_gelu", lambda *arguments: True)
    assert relative_error(feed_forward(x), expected) < (1e-2 if device == "cuda" else 1e-3)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("changed", ["hook", "replaced"])
def test_feed_forward_heeds_what_is_put_around_its_gelu(place, changed, monkeypatch):
    monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 4 * 24)
    feed_forward = LocalDiTFeedForward(24, activation_fn="gelu-approximate")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    before = feed_forward(x)
    if changed == "hook":
        feed_forward.net[place].register_forward_hook(lambda module, inputs, output: 2 * output)
    else:
        kind = type(feed_forward.net[place])
        doubled = {"forward": lambda self, x: 2 * kind.forward(self, x)}
        feed_forward.net[place].__class__ = type("Doubled", (kind,), doubled)
    expected = feed_forward(x)
    assert relative_error(expected, before) > 0.1
    with torch.no_grad():
        assert relative_error(feed_forward(x), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [True, False])
def test_rotary_embedding_in_half_precision_is_rounded_once(grad, dtype):
    cos, sin = rotary_table(3, 5, 12, torch.device("cpu"))
    x = torch.randn(2, 15, 4, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.set_grad_enabled(grad):
        assert apply_rotary(x.clone(), cos, sin).equal(apply_rotary(x.float(), cos, sin).to(dtype))


@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere_are_fetched():
    """As in sequential offloading: a weight is there only while its own module is called."""
    model, inputs = tiny_transformer(), random_inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)  # not 1, which a product that is left out is like
    expected = model(**inputs).sample
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.transformer_blocks[0].attn.norm_q.weight.device.type == "meta"
    torch.testing.assert_close(model(**inputs).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_weights_that_diffusers_keeps_elsewhere_are_fetched(offload_type, tmp_path, uninitialized_is_nan):
    """With group offloading to disk weights are empty tensors but while their own module is called."""
    model, inputs = tiny_transformer(), random_inputs()
    expected = model(**inputs).sample
    model.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert model.transformer_blocks[0].attn.to_q.weight.isnan().all()
    for _ in range(2):
        assert torch.equal(model(**inputs).sample, expected)


def test_gradients_with_weights_kept_in_float8():
    """Layerwise casting narrows weights again after the forward pass; LoRA is trained on such models."""
    cast = tiny_transformer(num_layers=2).bfloat16().requires_grad_(False)
    model = copy.deepcopy(cast)
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for parameter, stored in zip(model.parameters(), cast.parameters()):
        parameter.copy_(stored)
    assert sum(parameter.dtype == torch.float8_e4m3fn for parameter in cast.parameters()) > 50
    inputs = in_dtype(torch.bfloat16, random_inputs())
    start = inputs.pop("hidden_states").requires_grad_()
    (expected,), (gradient,) = (
        torch.autograd.grad(m(start, **inputs).sample.square().mean(), start) for m in (model, cast)
    )
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skipped", [["attention", "ff"], ["attention"], ["ff"], ["attention_scores"]], ids="-".join)
@torch.no_grad()
def test_layers_are_skipped(skipped, dtype):
    """As diffusers has it what is skipped returns its input, and without scores attention returns its values."""
    model = tiny_transformer().to(dtype)
    inputs = in_dtype(dtype, random_inputs())
    reference = copy.deepcopy(model)
    names = ("attention", "ff", "attention_scores")
    config = LayerSkipConfig(indices=[1, 3], **{f"skip_{name}": name in skipped for name in names})
    apply_layer_skip(model, config)

    class ValuesAlone(LocalDiTWindowAttnProcessor):
        def _attend(self, attn, query, key, value, bias_table, geometry):
            return value

    for block in (reference.transformer_blocks[i] for i in config.indices):
        match skipped:
            case ["attention", "ff"]:
                block.forward = lambda hidden_states, *args: hidden_states
            case ["attention"]:
                block.attn.forward = lambda hidden_states, geometry: hidden_states
            case ["ff"]:
                block.ff.forward = lambda hidden_states: hidden_states
            case ["attention_scores"]:
                block.attn.set_processor(ValuesAlone())
    torch.testing.assert_close(model(**inputs).sample, reference(**inputs).sample)


@pytest.mark.parametrize("with_mask", [True, False])
def test_training_in_half_precision_follows_float32(with_mask):
    """On a CPU attention is then computed operation by operation."""
    model, inputs = tiny_transformer(), random_inputs()
    if not with_mask:
        inputs["encoder_attention_mask"] = None
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            sample = model(**inputs).sample
        sample.float().square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert 1e-4 < relative_error(*gradients) < 3e-2


@pytest.mark.parametrize("texts", ["masked", "whole", "one-for-all"])
def test_queries_in_parts_change_nothing(model, texts, monkeypatch):
    inputs = random_inputs(16, 24)
    if texts == "whole":
        del inputs["encoder_attention_mask"]
    if texts == "one-for-all":
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            inputs[name] = inputs[name][1:]

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        sample = model(**inputs).sample
        sample.square().mean().backward()
        return [sample.detach(), *(parameter.grad for parameter in model.parameters())]

    expected, shapes, attention = results(), [], transformer_localdit.attention

    def watch(processor, query, *rest):
        shapes.append(query.shape)
        return attention(processor, query, *rest)

    monkeypatch.setattr(transformer_localdit, "query_parts", lambda processor, query: 4)
    monkeypatch.setattr(transformer_localdit, "attention", watch)
    least = 0.1 * max(gradient.norm() for gradient in expected[1:])  # that of a key's bias is zero but for rounding
    for x, y in zip(results(), expected, strict=True):
        assert (x - y).norm() < 1e-5 * max(y.norm(), least)
    assert shapes.count((8, 24, 2, 12)) == len(model.transformer_blocks)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({}, 8),
        ({"is_cuda": False}, 1),
        ({"requires_grad": False}, 1),
        ({"shape": (2, 4095, 16, 72)}, 1),
        ({"shape": (2, 1016, 16, 72)}, 1),
        ({"shape": (16, 4096, 16, 72)}, 1),  # enough programs without
    ],
)
def test_queries_are_cut_in_training_where_a_gpu_would_be_idle(changes, parts):
    query = SimpleNamespace(**{"is_cuda": True, "requires_grad": True, "shape": (2, 4096, 16, 72), **changes})
    assert query_parts(SimpleNamespace(_parallel_config=None), query) == parts
    assert query_parts(SimpleNamespace(_parallel_config="ring"), query) == 1


@torch.no_grad()
def test_nothing_is_larger_than_the_hidden_states(monkeypatch):
    # 64 x 64 tokens in slabs of 1024: no tokens by tokens, no four times as wide feed-forward.
    monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 1024 * 24)
    model = tiny_transformer(num_layers=4)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return output

    cached_token_map_geometry.cache_clear()
    with Largest():
        model(**random_inputs(128, 128, batch_size=1))
    gc.collect()
    assert largest == 64 * 64 * 24


def test_hidden_states_lie_contiguous_in_all_blocks(model):
    """Token by token. Else each sum, norm and modulation of each block makes strided passes over memory."""
    orders = []
    handles = [
        block.register_forward_hook(lambda module, args, output: orders.append((args[0].stride(), output.stride())))
        for block in model.transformer_blocks
    ]
    with torch.no_grad():
        model(**random_inputs())
    for handle in handles:
        handle.remove()
    contiguous = (8 * 8 * 24, 24, 1)
    assert orders == [(contiguous, contiguous)] * 5


def test_step_cache_embeds_text_and_sizes_once(model):
    text = random_inputs()
    del text["hidden_states"], text["timestep"]
    once = [model.caption_projection, model.adaln_single.emb.resolution_embedder]
    once += [module for block in model.transformer_blocks for module in (block.cross_attn.to_k, block.cross_attn.to_v)]
    calls = []
    handles = [module.register_forward_pre_hook(lambda module, args: calls.append(module)) for module in once]
    step_cache = model.make_step_cache()
    with torch.no_grad():
        for seed in range(3):
            step = {name: random_inputs(seed=seed)[name] for name in ("hidden_states", "timestep")}
            expected = model(**step, **text).sample
            calls.clear()
            assert torch.equal(model(**step, **text, step_cache=step_cache).sample, expected)
            assert len(calls) == (len(once) if seed == 0 else 0)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("mask", "length", "masked"),
    [
        ([[1, 1, 0, 0, 0]], 2, False),
        ([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]], 3, True),
        ([[0, 1, 0, 1, 0]], 4, True),
        ([[1, 0.5, 0, 0, 0]], 2, True),
        ([[1, 1, 1, 1, 1]], 5, False),
        ([[0, 0, 0, 0, 0]], 5, True),
        ([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], 5, True),  # the first attends to all five alike
        (None, 5, False),
    ],
)
@torch.no_grad()
def test_padding_of_the_text_costs_nothing_and_changes_nothing(model, mask, length, masked, monkeypatch):
    inputs = random_inputs(batch_size=1 if mask is None else len(mask), text_tokens=5)
    inputs["encoder_attention_mask"] = mask = None if mask is None else torch.tensor(mask, dtype=torch.float32)
    kept, kept_mask = without_padding(inputs["encoder_hidden_states"], mask)
    assert kept.equal(inputs["encoder_hidden_states"][:, :length])
    assert kept_mask.equal(mask[:, :length]) if masked else kept_mask is None

    lengths = []
    handle = model.caption_projection.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    output = model(**inputs).sample
    monkeypatch.setattr(transformer_localdit, "without_padding", lambda *arguments: arguments)
    expected = model(**inputs).sample
    handle.remove()
    assert lengths == [length, 5]
    assert relative_error(output, expected) < 1e-6


VECTOR = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@given(
    length=st.integers(1, 40),
    last=st.sampled_from([None, 0, 1, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    queries=st.sampled_from([10, 70]),
)
@settings(derandomize=True, database=None)
@torch.no_grad()
def test_keys_that_fill_vectors_have_no_weight(length, last, dtype, queries):
    """The second sample may attend to the first `last` keys alone, and if that is none, to all alike."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, size, 2, 8, generator=generator).to(dtype) for size in (queries, length, length)
    )
    bias = None
    if last is not None:
        bias = torch.zeros(2, 1, 1, length, dtype=dtype)
        bias[1, ..., last:] = MASK_VALUE
    padded = pad_keys(key, value, bias)
    assert padded[0].shape[1] == padded[1].shape[1] == -(-length // VECTOR) * VECTOR
    output = attention(LocalDiTCrossAttnProcessor(), query, *padded)
    expected = explicit_attention(*(x if x is None else x.double() for x in (query, key, value, bias)))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error(output[0], expected[0]) < tolerance
    # Scores of -10000 are exact to a thousandth.
    assert relative_error(output[1], expected[1]) < (tolerance if last != 0 else max(tolerance, 1e-3))


def test_text_is_padded_where_pytorchs_own_kernel_takes_it_and_no_gradients_are_kept(monkeypatch):
    lengths, parallel = [], []

    def record(query, key, *arguments, dispatch=transformer_localdit.dispatch_attention_fn, **settings):
        lengths.append(key.shape[1])
        parallel.append(settings["parallel_config"])
        return dispatch(query, key, *arguments, **settings | {"parallel_config": None})

    monkeypatch.setattr(transformer_localdit, "dispatch_attention_fn", record)
    model, inputs = tiny_transformer(num_layers=1), random_inputs(24, 24, text_tokens=19)
    expected = model(**inputs).sample
    assert lengths == [19]
    with torch.no_grad():
        assert relative_error(model(**inputs).sample, expected) < 1e-6
        assert lengths == [19, -(-19 // VECTOR) * VECTOR]
        with BaseTorchFunctionMode():
            model(**inputs)
        assert lengths[2:] == [16, 16, 19]  # windows, twice, and the text
        processor = model.transformer_blocks[0].cross_attn.processor
        monkeypatch.setattr(processor, "_parallel_config", "some", raising=False)
        model(**inputs)
        monkeypatch.setattr(processor, "_parallel_config", None)
        assert lengths[5:] == [19] and parallel == [None] * 5 + ["some"]
        model.set_attention_backend("native")
        model(**inputs)
        assert lengths[6:] == [16, 16, 19]


class TestModulation:
    @staticmethod
    def numbers(rows, dtype):
        generator = torch.Generator().manual_seed(0)
        tokens, modulation = (
            torch.randn(3, 50, 24, generator=generator),
            torch.randn(2, rows, 1, 24, generator=generator),
        )
        return tokens.to(dtype), *modulation.to(dtype)

    @staticmethod
    def plain(norm, tokens, shift, scale):
        return norm(tokens) * (1 + scale) + shift

    @torch.no_grad()
    @pytest.mark.parametrize("rows", [1, 3])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
    def test_in_one_pass(self, rows, dtype, tolerance, monkeypatch, uninitialized_is_nan):
        monkeypatch.setattr(transformer_localdit, "SLAB_NUMBERS", 3 * 7 * 24)
        norm, numbers = torch.nn.LayerNorm(24, elementwise_affine=False, eps=1e-6), self.numbers(rows, dtype)
        output = modulate(norm, *numbers)
        exact = self.plain(norm, *(x.double() for x in numbers))
        assert output.dtype == dtype
        assert relative_error(output, exact) < min(tolerance, 1.2 * relative_error(self.plain(norm, *numbers), exact))

    @torch.no_grad()
    def test_norms_of_somebodys_own_are_called(self):
        class Norm(torch.nn.LayerNorm):
            def forward(self, x):
                return 2 * super().forward(x)

        hooked, weighted = torch.nn.LayerNorm(24, elementwise_affine=False), torch.nn.LayerNorm(24)
        hooked.register_forward_hook(lambda module, args, output: 2 * output)
        torch.nn.init.uniform_(weighted.weight, 1, 2)
        for norm in (Norm(24, elementwise_affine=False), hooked, weighted):
            numbers = self.numbers(1, torch.float32)
            assert relative_error(modulate(norm, *numbers), self.plain(norm, *numbers)) < 1e-6

    @torch.no_grad()
    def test_another_dtype_widens(self):
        tokens, shift, scale = self.numbers(1, torch.bfloat16)
        norm = torch.nn.LayerNorm(24, elementwise_affine=False)
        assert modulate(norm, tokens, shift.float(), scale.float()).dtype == torch.float32


@pytest.mark.parametrize("changed", [None, "timestep", "resolution", "aspect_ratio"])
def test_rows_that_are_alike_are_embedded_once(model, changed, monkeypatch):
    inputs = random_inputs(batch_size=3)
    inputs["timestep"] = torch.full((3,), 500)
    if changed == "timestep":
        inputs["timestep"][1] = 20
    elif changed is not None:
        inputs["added_cond_kwargs"][changed] = inputs["added_cond_kwargs"][changed].clone()
        inputs["added_cond_kwargs"][changed][2] *= 2
    rows = []
    embedder = model.adaln_single.emb
    with torch.no_grad():
        for name in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
            getattr(embedder, name).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        outputs = [model(**inputs).sample]
        first = rows.copy()
        monkeypatch.setattr(transformer_localdit, "one_if_alike", lambda *tensors: tensors)
        outputs.append(model(**inputs).sample)
    for name in ("timestep_embedder", "resolution_embedder", "aspect_ratio_embedder"):
        getattr(embedder, name)._forward_pre_hooks.clear()
    assert first == ([1, 2, 1] if changed is None else [3, 6, 3])  # a resolution is two numbers
    assert relative_error(*outputs) < 1e-6


@torch.no_grad()
def test_inputs_without_numbers_are_not_looked_at(model):
    inputs = random_inputs()
    expected = model(**inputs).sample
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(**map_tensors(mode.from_tensor, inputs)).sample.shape == expected.shape
    mapped = ("timestep", "encoder_attention_mask")
    rest = {name: value for name, value in inputs.items() if name not in mapped}
    outputs = vmap(lambda timestep, mask: model(timestep=timestep, encoder_attention_mask=mask, **rest).sample)(
        *(torch.stack([inputs[name]] * 2) for name in mapped)
    )
    for output in outputs:
        assert relative_error(output, expected) < 1e-6


def test_one_row_of_sizes_does_for_a_batch_and_the_step_cache_for_half_of_it(model):
    """As FasterCache leaves out the unconditional half of the batch in some steps."""
    inputs = random_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        sizes = map_tensors(lambda rows: rows[:1], inputs.pop("added_cond_kwargs"))
        step_cache = model.make_step_cache()
        for rows in (slice(None), slice(1, None), slice(None)):
            part = map_tensors(lambda tensor, rows=rows: tensor[rows], inputs)
            sample = model(**part, added_cond_kwargs=sizes, step_cache=step_cache).sample
            torch.testing.assert_close(sample, expected[rows], rtol=1e-5, atol=1e-6)


def test_step_cache_takes_no_part_in_training(model):
    step_cache = model.make_step_cache()
    for _ in range(2):
        model(**random_inputs(), step_cache=step_cache).sample.sum().backward()
    assert model.caption_projection.linear_1.weight.grad.any()
    model.zero_grad()


@pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")
@torch.no_grad()
def test_lora_scale_is_an_attention_kwarg():
    from peft import LoraConfig

    model = tiny_transformer()
    expected = model(**random_inputs()).sample
    model.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    adapted = model(**random_inputs()).sample
    assert relative_error(adapted, expected) > 1e-3
    assert torch.equal(model(**random_inputs(), attention_kwargs={"scale": 0.0}).sample, expected)
    assert torch.equal(model(**random_inputs(), attention_kwargs={"scale": 1.0}).sample, adapted)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"attention_head_dim": 18}, "multiple of 4"),
        ({"num_attention_heads": 2, "attention_head_dim": 8}, "multiple of 12"),
        ({"num_layers": 0}, "`num_layers` must be at least 1 but is 0"),
        ({"num_attention_heads": -2, "attention_head_dim": -12}, "`num_attention_heads` must be at least 1 but is -2"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.zeros(2, 4, 15, 16)}, "multiples of the patch size 2 but has 15 x 16"),
        ({"hidden_states": torch.zeros(2, 4, 16, 15)}, "multiples of the patch size 2 but has 16 x 15"),
        ({"added_cond_kwargs": None}, "added_cond_kwargs"),
        ({"added_cond_kwargs": {"resolution": torch.zeros(2, 2)}}, "aspect_ratio"),
        ({"encoder_attention_mask": torch.ones(2, 3)}, r"here \(2, 7\), but has \(2, 3\)"),
        ({"encoder_attention_mask": torch.ones(2, 1, 7)}, r"has \(2, 1, 7\)"),
        ({"hidden_states": torch.zeros(1, 4, 16, 16)}, r"each of the 1 `hidden_states`, .* shape \(2, 7, 16\)"),
        ({"encoder_attention_mask": torch.ones(3, 7)}, r"`encoder_attention_mask` must .* shape \(3, 7\)"),
        ({"timestep": torch.tensor(5)}, r"`timestep` must have a row for each of the 2 .* the shape \(\)"),
        (
            {"added_cond_kwargs": {"resolution": torch.zeros(3, 2), "aspect_ratio": torch.zeros(1, 1)}},
            r"`resolution` must have a row",
        ),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_unusable_inputs_are_refused(model, change, message, grad):
    with pytest.raises(ValueError, match=message), torch.set_grad_enabled(grad):
        model(**{**random_inputs(), **change})


def test_block_names_are_a_contract(model):
    names = {name.removeprefix("transformer_blocks.4.") for name in model.state_dict() if "blocks.4." in name}
    linear = {f"{module}.{kind}" for kind in ("weight", "bias") for module in ("to_q", "to_k", "to_v", "to_out.0")}
    norms = {"norm_q.weight", "norm_k.weight"}
    stage = {"depthwise.weight", "squeeze.weight", "excite.weight", "pointwise.weight"}
    context = {f"query_stages.{i}.{name}" for i in range(2) for name in stage}
    context |= {"rel_pos_bias", "to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias"}
    expected = {"scale_shift_table", "attn.rel_pos_bias"}
    expected |= {f"{attn}.{name}" for attn in ("attn", "cross_attn") for name in linear | norms}
    expected |= {f"attn.global_context.{name}" for name in context}
    expected |= {f"ff.net.{name}" for name in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias")}
    assert names == expected
