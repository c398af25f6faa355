"""Renders scenes with captions that are not held out and encodes both, once, for the training of the transformer.

Reads `vae`, `tokenizer` and `text_encoder` from a folder and writes beside them:

- `latents.npy`: float16 (pictures, 4, 16, 16), means of the posterior times the VAE's scaling factor
- `caption_index.npy`: int32 (pictures,), each picture's row in the next two
- `embeddings.npy`: float16 (captions, length, channels), the text encoder's output; row 0 is the empty prompt
- `embedding_masks.npy`: bool (captions, length), True where there is a token
- `captions.txt`: one line per row, the first one empty
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scenes import render, sample_scene
from tqdm import tqdm
from transformers import T5EncoderModel, T5Tokenizer


@dataclass
class LatentDataset:
    """What this script wrote, in memory."""

    latents: np.ndarray
    caption_index: np.ndarray
    embeddings: np.ndarray
    masks: np.ndarray

    def batch(self, batch_size: int, caption_dropout: float, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Draws latents (batch, 4, height, width), embeddings (batch, length, channels), masks (batch, length).

        A share `caption_dropout` of the captions is replaced by the empty prompt.
        """
        rows = torch.randint(len(self.latents), (batch_size,), generator=generator).numpy()
        dropped = torch.rand(batch_size, generator=generator).numpy() < caption_dropout
        captions = np.where(dropped, 0, self.caption_index[rows])
        arrays = (self.latents[rows], self.embeddings[captions], self.masks[captions])
        return tuple(torch.from_numpy(array).float() for array in arrays)


def load_latents(folder: Path) -> LatentDataset:
    names = ("latents", "caption_index", "embeddings", "embedding_masks")
    return LatentDataset(*(np.load(Path(folder) / f"{name}.npy") for name in names))


def encode_captions(captions: list[str], tokenizer: T5Tokenizer, encoder: T5EncoderModel):
    """Embeddings (captions, length, channels) as float16 and masks (captions, length), padded to the longest."""
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    batches = zip(tokens.input_ids.split(512), tokens.attention_mask.split(512))
    embeddings = [encoder(ids, attention_mask=mask).last_hidden_state.half() for ids, mask in batches]
    return torch.cat(embeddings).numpy(), tokens.attention_mask.bool().numpy()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/shapes"))
    parser.add_argument("--pictures", type=int, default=60000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_flush_denormal(True)
    vae = AutoencoderKL.from_pretrained(args.folder / "vae")
    rng = np.random.default_rng(args.seed)
    rows = {"": 0}
    latents, caption_index = [], []
    for start in tqdm(range(0, args.pictures, args.batch_size), mininterval=5):
        scenes = [sample_scene(rng) for _ in range(min(args.batch_size, args.pictures - start))]
        caption_index += [rows.setdefault(scene.caption, len(rows)) for scene in scenes]
        pictures = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
        pixels = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append((vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).half().numpy())

    tokenizer = T5Tokenizer.from_pretrained(args.folder / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(args.folder / "text_encoder")
    embeddings, masks = encode_captions(list(rows), tokenizer, encoder)
    np.save(args.folder / "embeddings.npy", embeddings)
    np.save(args.folder / "embedding_masks.npy", masks)
    np.save(args.folder / "caption_index.npy", np.array(caption_index, dtype=np.int32))
    np.save(args.folder / "latents.npy", np.concatenate(latents))
    (args.folder / "captions.txt").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
