"""Tiny components of a LocalDiT pipeline, made here so that the tests need no download."""

from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from diffusers_localdit.transformer_localdit import LocalDiTTransformer2DModel

SENTENCES = [
    f"a {size} {color} {shape} {relation} a {other} on a {background} background"
    for size in ("small", "large")
    for color in ("red", "green", "blue", "yellow")
    for shape in ("circle", "square", "triangle")
    for relation in ("left of", "right of", "above", "below")
    for other in ("Circle", "cube!")
    for background in ("white", "grey", "black")
]


def make_tokenizer(folder: Path) -> T5Tokenizer:
    """A T5 tokenizer with a sentencepiece vocabulary trained on `SENTENCES`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "spiece.model", "wb") as model_file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=model_file,
            vocab_size=40,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def make_components(folder: Path) -> dict:
    """All components, the weights drawn under a fixed seed. The model is one for pictures of 128 x 128 pixels."""
    tokenizer = make_tokenizer(folder / "sentencepiece")
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
        force_upcast=False,
    )
    transformer = LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=4, caption_channels=32, sample_size=16
    )
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", algorithm_type="dpmsolver++")
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": scheduler,
    }
