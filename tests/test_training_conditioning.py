"""What batches become before the transformer sees them: dropped captions, padding, prompts kept for the next start."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from diffusers_localdit import BUNDLED_MODEL, LocalDiTPipeline
from diffusers_localdit.training.conditioning import EMPTY_CAPTION, Conditioning
from diffusers_localdit.training.shards import PRECOMPUTE_SETTINGS

CPU = torch.device("cpu")
PROMPT = "a red circle on a white background"


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder that knows the empty caption, of two tokens, and the pipeline."""
    (tmp_path / "shards").mkdir()
    save_file({"prompt_embeds": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()}, tmp_path / "shards" / EMPTY_CAPTION)
    (tmp_path / "shards" / PRECOMPUTE_SETTINGS).write_text(json.dumps({"pipeline": "localdit-shapes"}))
    return tmp_path / "shards"


def make(shards: Path, prompts: list[str] | None = None, **options) -> Conditioning:
    cache = shards.parent / "run" / "prompts.safetensors"
    return Conditioning(None, str(shards), True, prompts or [], cache, CPU, **options)


def batch(tokens: int, dropped: list[bool]) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.zeros(2, 4, 2, 2),
        "prompt_embeds": torch.full((2, tokens, 2), 9.0),
        "prompt_attention_mask": torch.tensor([[1] * tokens, [1] + [0] * (tokens - 1)]),
        "caption_dropped": torch.tensor(dropped),
    }


@pytest.mark.parametrize("tokens, text_tokens", [(1, None), (2, None), (4, None), (3, 6)])
def test_dropped_caption_becomes_the_empty_one(tokens, text_tokens, shards):
    _, embeds, mask = make(shards, text_tokens=text_tokens)(batch(tokens, [True, False]))
    length = text_tokens or max(tokens, 2)
    assert embeds.shape == (2, length, 2) and mask.shape == (2, length)
    assert mask.tolist() == [[1, 1] + [0] * (length - 2), [1] + [0] * (length - 1)]
    assert embeds[0, :2].tolist() == [[1, 2], [3, 4]] and not embeds[0, 2:].any()
    assert (embeds[1, :tokens] == 9).all() and not embeds[1, tokens:].any()


def test_caption_longer_than_all_are_padded_to_is_refused(shards):
    with pytest.raises(ValueError, match="a caption has 3 tokens, more than text_tokens: 2; give a larger --text-tok"):
        make(shards, text_tokens=2)(batch(3, [False, False]))


def test_prompts_are_encoded_once_and_as_the_pipeline_does(shards, monkeypatch):
    (shards / EMPTY_CAPTION).unlink()
    first = make(shards, [PROMPT])
    pipe = LocalDiTPipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    embeds, mask, empty, empty_mask = pipe.encode_prompt(PROMPT)
    torch.testing.assert_close(first.prompt_embeds[0], embeds[mask.bool()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.empty, empty[empty_mask.bool()], rtol=1e-5, atol=1e-5)

    def refuse(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers_localdit.training.conditioning.encode_captions", refuse)
        again = make(shards, [PROMPT])
        assert again.prompt_embeds[0].equal(first.prompt_embeds[0]) and again.empty.equal(first.empty)
        with pytest.raises(AssertionError, match="encoded again"):
            make(shards, [PROMPT, "a blue square"])
    both = make(shards, [PROMPT, "a blue square"])
    monkeypatch.setattr("diffusers_localdit.training.conditioning.encode_captions", refuse)
    for kept, embeds in zip(make(shards, [PROMPT, "a blue square"]).prompt_embeds, both.prompt_embeds):
        assert kept.equal(embeds)


def test_vae_of_another_scale_is_refused(tmp_path, monkeypatch):
    other = SimpleNamespace(vae_scale_factor=16)
    monkeypatch.setattr("diffusers_localdit.training.conditioning.load_parts", lambda *_, **__: other)
    with pytest.raises(ValueError, match="the VAE of mine makes one of 16 pixels, not of 8"):
        Conditioning("mine", str(tmp_path), False, [], tmp_path / "prompts.safetensors", CPU)


def test_without_a_pipeline(shards):
    (shards / PRECOMPUTE_SETTINGS).unlink()
    assert len(make(shards).empty) == 2  # nothing else is needed
    with pytest.raises(ValueError, match="give --pipeline"):
        make(shards, [PROMPT])
