"""Trains the tokenizer and the small T5 encoder of localdit-shapes on captions.

The encoder learns to parse: from every token's hidden state, linear heads read the whole caption, and from the tokens
of an object's phrase also that object's own attributes. The heads are thrown away; what stays is an embedding in which
every token knows its object, so that the transformer has only to look.
"""

import argparse
import json
import string
import tempfile
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from scenes import BACKGROUNDS, COLOURS, OPPOSITE, RADII, SHAPES, Spec, sample_caption
from torch import nn
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel, T5Tokenizer

# Answers of the parsing heads; 0 is always "does not apply".
ITEM_ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(RADII)}
ROLES = ("alone", "first", "second", *OPPOSITE)
HEADS = {
    "background": tuple(BACKGROUNDS),
    "count": (1, 2, 3, 4),
    **{f"{place}_{name}": values for place in ("first", "second") for name, values in ITEM_ANSWERS.items()},
    **{f"own_{name}": values for name, values in ITEM_ANSWERS.items()},
    "own_role": ROLES,
}


def train_tokenizer(captions: list[str], output: Path, vocab_size: int = 200) -> T5Tokenizer:
    """Saves a lower-case sentencepiece unigram tokenizer of `captions` and all printable characters to `output`."""
    # The trainer finds a whole word only where it is seen with different endings, so every word also comes with marks.
    words = sorted({word for caption in captions for word in caption.split()})
    marked = [f"{word}{mark}" for word in words for mark in ",.!?" for _ in range(100)]
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions + marked),
            model_prefix=f"{folder}/spiece",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            required_chars=string.ascii_lowercase + string.digits + string.punctuation,
            normalization_rule_name="nmt_nfkc_cf",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        # `from_pretrained` converts the sentencepiece file; the constructor would ignore it.
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0, "model_max_length": 120}))
        tokenizer = T5Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(output)
    return tokenizer


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def answers(spec: Spec | None, item: int | None) -> list[int]:
    """What the heads should read from a token of object `item` (None: of no object); no spec is the empty prompt."""
    truth = {}
    if spec is not None:
        truth = {"background": spec.background, "count": spec.count if spec.kind == "count" else len(spec.items)}
        for place, index in (("first", 0), ("second", 1), ("own", item)):
            if index is not None and index < len(spec.items):
                truth |= {f"{place}_{name}": getattr(spec.items[index], name) for name in ITEM_ANSWERS}
        if item is not None:
            alone = "alone" if len(spec.items) == 1 else ("first", "second")[item]
            # "A left of B": A is at the left, B at the right.
            truth["own_role"] = (spec.relation, OPPOSITE[spec.relation])[item] if spec.relation else alone
    return [1 + values.index(truth[name]) if name in truth else 0 for name, values in HEADS.items()]


def object_of_token(caption: str, spec: Spec, offset: tuple[int, int]) -> int | None:
    """Which object's phrase the token at the characters `offset` belongs to."""
    start, end = offset
    if start == end:  # a special token
        return None
    position = 0
    for index, item in enumerate(spec.items):
        words = caption.split(f"{item.colour} {item.shape}")[0] if spec.kind == "count" else None
        phrase = f"{words}{item.colour} {item.shape}s" if spec.kind == "count" else item.phrase()
        position = caption.index(phrase, position)
        if position <= start < position + len(phrase):
            return index
        position += len(phrase)
    return None


def labelled_batch(rng: np.random.Generator, tokenizer: T5Tokenizer, batch_size: int):
    """Captions, one in 32 of them empty: token ids and mask (batch, length), labels (batch, length, heads)."""
    drawn = [(None, "") if i % 32 == 0 else sample_caption(rng) for i in range(batch_size)]
    tokens = tokenizer(
        [caption for _, caption in drawn], padding=True, return_offsets_mapping=True, return_tensors="pt"
    )
    ignored = [-100] * len(HEADS)  # padding
    labels = [
        [
            answers(spec, object_of_token(caption, spec, offset) if spec else None) if kept else ignored
            for offset, kept in zip(offsets, mask)
        ]
        for (spec, caption), offsets, mask in zip(
            drawn, tokens.offset_mapping.tolist(), tokens.attention_mask.tolist()
        )
    ]
    return tokens.input_ids, tokens.attention_mask, torch.tensor(labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/shapes"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tokenizer = train_tokenizer([sample_caption(rng)[1] for _ in range(20000)], args.output / "tokenizer")

    encoder = build_text_encoder(tokenizer)
    sizes = [1 + len(values) for values in HEADS.values()]
    heads = nn.Linear(encoder.config.d_model, sum(sizes))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=args.steps)
    for step in tqdm(range(1, args.steps + 1), mininterval=10):
        input_ids, mask, labels = labelled_batch(rng, tokenizer, args.batch_size)
        hidden_states = encoder(input_ids, attention_mask=mask).last_hidden_state
        logits = heads(hidden_states).split(sizes, dim=-1)
        loss = sum(F.cross_entropy(head.flatten(0, 1), labels[..., i].flatten()) for i, head in enumerate(logits))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps:
            guesses = torch.stack([head.argmax(dim=-1) for head in logits], dim=-1)
            right = (guesses == labels)[labels != -100].float().mean()
            tqdm.write(f"step {step}: loss {loss:.4f}, {100 * right:.2f}% of the answers right")
    encoder.save_pretrained(args.output / "text_encoder")


if __name__ == "__main__":
    main()
