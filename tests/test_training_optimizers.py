"""Muon and AdamW as one optimizer: what each is for, and that together they do what both do alone."""

import pytest
import torch
from test_training_distributed import FSDP2
from training_inputs import Training, assert_same_run, rows, run_processes, write_shard

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.training.models import add_lora, memory_estimate
from diffusers_localdit.training.optimizers import build_optimizer, split_parameters
from diffusers_localdit.training.settings import TrainingSettings

TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": 8, "sample_size": 4}
MUON = TrainingSettings(optimizer="muon", learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.99)


@pytest.fixture
def transformer() -> LocalDiTTransformer2DModel:
    torch.manual_seed(0)
    return LocalDiTTransformer2DModel(**TINY)


def draw_gradients(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_blocks(transformer):
    frozen = transformer.transformer_blocks[0].attn.to_q.weight.requires_grad_(False)
    matrices, others = split_parameters(transformer)
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    assert {id(p) for p in matrices} | {id(p) for p in others} == {id(p) for p in names} - {id(frozen)}
    assert len(matrices) + len(others) == len(names) - 1
    chosen = {names[matrix] for matrix in matrices}
    assert all(name.startswith("transformer_blocks.") and name.endswith(".weight") for name in chosen)
    assert {"transformer_blocks.0.ff.net.2.weight", "transformer_blocks.1.cross_attn.to_k.weight"} < chosen
    # Tables have two dimensions too, but are no matrices that something is multiplied by.
    assert not any("table" in name or "bias" in name or "norm" in name or "depthwise" in name for name in chosen)


def test_follows_both_alone_also_after_loading(transformer):
    ours = split_parameters(transformer)
    theirs = [[torch.nn.Parameter(p.detach().clone()) for p in part] for part in ours]
    optimizer = build_optimizer(MUON, transformer)
    alone = [
        torch.optim.Muon(theirs[0], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[1], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-10, fused=True),
    ]
    for step in range(4):
        if step == 2:  # as a run that is resumed
            saved = optimizer.state_dict()
            optimizer = build_optimizer(MUON, transformer)
            optimizer.load_state_dict(saved)
        for group in (*optimizer.param_groups, *(group for part in alone for group in part.param_groups)):
            group["lr"] = 1e-2 / (1 + step)  # as a schedule does
        draw_gradients([*ours[0], *ours[1]], seed=step)
        draw_gradients([*theirs[0], *theirs[1]], seed=step)
        optimizer.step()
        for part in alone:
            part.step()
    assert all(our.equal(their) for our, their in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True))


def test_low_rank_layers_are_matrices_all_of_them(transformer):
    add_lora(transformer, rank=2)
    matrices, others = split_parameters(transformer)
    assert len(matrices) == sum(p.requires_grad for p in transformer.parameters()) > 0 and not others
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer = build_optimizer(MUON, transformer)
    draw_gradients(matrices, seed=0)
    optimizer.step()
    assert not any(matrix.equal(other) for matrix, other in zip(matrices, before))


def test_updates_are_of_the_size_of_those_of_adamw(transformer):
    """By which one learning rate serves both: 0.2 of it in the root mean square, where AdamW's first step has 1."""
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    optimizer = build_optimizer(MUON.replace(weight_decay=0), transformer)
    draw_gradients(transformer.parameters(), seed=0)
    optimizer.step()
    for name in ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.ff.net.0.proj.weight"):
        update = (transformer.get_parameter(name) - before[name]).square().mean().sqrt().item()
        assert update == pytest.approx(0.2 * 1e-2, rel=0.3)  # Newton-Schulz brings singular values to 0.7 ... 1.2


def test_memory_of_the_state(transformer):
    optimizer = build_optimizer(MUON, transformer)
    draw_gradients(transformer.parameters(), seed=0)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory_estimate(transformer, MUON)["optimizer"] == sum(t.nbytes for t in tensors)
    in_bytes = memory_estimate(transformer, MUON.replace(optimizer="adamw_8bit"))["optimizer"]
    assert in_bytes == 2 * transformer.num_parameters()


def test_stopped_run_ends_as_the_uninterrupted_one(tmp_path):
    data = write_shard(tmp_path / "data")
    settings = {"optimizer": "muon", "steps": 8, "checkpoint_every": 4, "validate_every": 4}
    Training(data, tmp_path / "whole", **settings).finish()
    for steps in (4, 8):
        Training(data, tmp_path / "run", **(settings | {"steps": steps})).finish()
    assert_same_run(tmp_path / "run", tmp_path / "whole", 8)


def test_sharded_run_follows_one_process(tmp_path):
    data = write_shard(tmp_path / "data")
    settings = {"optimizer": "muon", "steps": 6}
    Training(data, tmp_path / "one", batch_size=4, **settings).finish()
    for process in run_processes(data, tmp_path / "two", count=2, batch_size=2, env=FSDP2, **settings):
        process.finish()
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
