"""
diffusers' caches on the bundled model: they skip work, and the picture stays near the one without a cache. With the
released LocalDiT's sampler: the noise of the bundled model's own makes each step's input another one.
"""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline

PROMPTS = ["a red circle on a white background", "a small blue square left of a large green triangle"]


@pytest.fixture(scope="module")
def pipe():
    pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def draw(pipe):
    """Final latents, and for how many rows of batches attention and feed-forward of the last block ran."""

    def draw_and_count() -> tuple[torch.Tensor, int]:
        calls = []
        block = pipe.transformer.transformer_blocks[-1]
        modules = (block.attn.to_out[0], block.cross_attn.to_q, block.ff.net[0])
        handles = [module.register_forward_pre_hook(lambda _, args: calls.append(len(args[0]))) for module in modules]
        # Of eight pictures those of seeds 3 and 5 take another course under one or two of these caches (19 to 26 dB).
        generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        latents = pipe(PROMPTS, guidance_scale=1.5, generator=generators, output_type="latent").images
        for handle in handles:
            handle.remove()
        return latents, sum(calls)

    return draw_and_count


@pytest.fixture(scope="module")
def exact(draw):
    return draw()


@pytest.mark.parametrize("cache", ["first block", "taylor", "pyramid", "faster"])
def test_less_work_and_nearly_the_same_picture(cache, pipe, draw, exact):
    config = {
        "first block": FirstBlockCacheConfig(threshold=0.1),
        "taylor": TaylorSeerCacheConfig(cache_interval=2, max_order=2, taylor_factors_dtype=torch.float32),
        "pyramid": PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=2,
            cross_attention_block_identifiers=(r"transformer_blocks.*\.cross_attn$",),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        "faster": FasterCacheConfig(
            unconditional_batch_skip_range=2,
            spatial_attention_block_identifiers=(r"transformer_blocks.*\.attn$",),
            tensor_format="BCHW",
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
    }[cache]
    pipe.transformer.enable_cache(config)
    latents, calls = draw()
    pipe.transformer.disable_cache()
    expected, all_calls = exact
    peak = expected.amax(dim=(1, 2, 3)) - expected.amin(dim=(1, 2, 3))
    psnr = 10 * torch.log10(peak.square() / (latents - expected).square().mean(dim=(1, 2, 3)))
    assert calls < all_calls
    assert psnr.min() > 28 and psnr.max() < 90, psnr
