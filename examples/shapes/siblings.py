"""Trains one of the models that docs/TRAIN.md compares; what follows its name are options of `localdit train`.

    torchrun --nproc-per-node 2 examples/shapes/siblings.py window --data-root DIR --output DIR

Run the same command again to resume. All have 2.9 million parameters: those without the global branch have eight
blocks instead of six.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.key_mapping import key_table
from diffusers_localdit.state_dict_conversion import seeded_branch
from diffusers_localdit.training import train
from diffusers_localdit.training.models import build_transformer
from diffusers_localdit.training.settings import TrainingSettings
from diffusers_localdit.transformer_localdit import WindowGeometry, apply_rotary

CONFIG = Path(__file__).with_suffix(".yaml")
BRANCH_SEED = 0


class FullAttnProcessor:
    """Self-attention from every token to every token: LocalDiT's but for the windows and what belongs to them."""

    def __call__(self, attn, hidden_states: torch.Tensor, geometry: WindowGeometry) -> torch.Tensor:
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in attn.project(hidden_states))
        query, key = (
            apply_rotary(norm(tokens), geometry.rotary_cos, geometry.rotary_sin)
            for norm, tokens in ((attn.norm_q, query), (attn.norm_k, key))
        )
        return attn.to_out[0](dispatch_attention_fn(query, key, value).flatten(2))  # (B, L, C)


def as_it_is(transformer: LocalDiTTransformer2DModel) -> None:
    """Nothing to do."""


def attend_everywhere(transformer: LocalDiTTransformer2DModel) -> None:
    """Full attention in place of windows. The bias tables are not used, hence not trained."""
    transformer.set_attn_processor(FullAttnProcessor())
    for block in transformer.transformer_blocks:
        block.attn.rel_pos_bias.requires_grad_(False)


def freeze_branch(transformer: LocalDiTTransformer2DModel, seed: int = BRANCH_SEED) -> None:
    """
    The original's habit: the global branch and all bias tables, which its optimizer never saw, stay as they began.
    """
    branch = seeded_branch(transformer.config, seed, torch.float32)
    for row in key_table(transformer.config.num_layers):
        if row.original in branch:
            transformer.load_state_dict(row.split(branch[row.original]), strict=False)
    for block in transformer.transformer_blocks:
        block.attn.rel_pos_bias.requires_grad_(False)
        block.attn.global_context.requires_grad_(False)


@dataclass(frozen=True)
class Sibling:
    """A model of the comparison: what it is called, how it differs from the preset's, what is done to it when new."""

    title: str
    architecture: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[LocalDiTTransformer2DModel], None] = as_it_is


WITHOUT_BRANCH = {"num_layers": 8, "use_global_context": False}
SIBLINGS = {
    "window_global": Sibling("windows with global context"),
    "window": Sibling("windows only", WITHOUT_BRANCH),
    "full": Sibling("full attention", WITHOUT_BRANCH, attend_everywhere),
    "frozen_branch": Sibling("windows with a random, frozen global branch", prepare=freeze_branch),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sibling", choices=SIBLINGS)
    args, options = parser.parse_known_args(argv)
    sibling = SIBLINGS[args.sibling]

    def build(settings: TrainingSettings) -> LocalDiTTransformer2DModel:
        transformer = build_transformer(settings)
        sibling.prepare(transformer)
        return transformer

    common = ["--preset", "shapes", "--config", str(CONFIG), "--architecture", json.dumps(sibling.architecture)]
    return train.main([*common, *options], prog="siblings.py", build=build)


if __name__ == "__main__":
    sys.exit(main())
