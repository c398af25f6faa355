"""The models that are compared with the bundled one: what each computes, what it trains, and how runs are read."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_inputs import CHANNELS, arguments, own_process_as_before, rows, write_shard  # noqa: F401

from diffusers_localdit import LocalDiTTransformer2DModel
from diffusers_localdit.training.checkpoints import trainable
from diffusers_localdit.training.models import build_transformer, read_transformer
from diffusers_localdit.training.settings import PRESETS, TrainingSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))

import accuracy_curve
import compare_siblings
import siblings
from grow import grow
from grow import main as grow_main

TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "caption_channels": CHANNELS}


def tiny(name: str, **architecture) -> LocalDiTTransformer2DModel:
    torch.manual_seed(0)
    sibling = siblings.SIBLINGS[name]
    transformer = LocalDiTTransformer2DModel(**(TINY | sibling.architecture | {"sample_size": 8} | architecture))
    sibling.prepare(transformer)
    return transformer


def predict(transformer: LocalDiTTransformer2DModel, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return transformer(
        torch.randn(2, 4, side, side, generator=generator),
        encoder_hidden_states=torch.randn(2, 3, CHANNELS, generator=generator),
        timestep=torch.tensor([10, 500]),
        added_cond_kwargs={"resolution": torch.full((2, 2), 8.0 * side), "aspect_ratio": torch.ones(2, 1)},
    ).sample


def test_parameters_are_equal_within_three_percent():
    preset = TrainingSettings().replace(**yaml.safe_load((PRESETS / "shapes.yaml").read_text()))
    counts = {}
    for name, sibling in siblings.SIBLINGS.items():
        with torch.device("meta"):
            settings = preset.replace(architecture=sibling.architecture)
            counts[name] = build_transformer(settings).num_parameters()
    assert max(counts.values()) < 1.03 * min(counts.values()), counts


def test_full_attention_is_that_of_one_window_over_all():
    """Window attention with one unshifted window, as in the first block, and no bias has to say the same."""
    full = tiny("full", num_layers=1)
    window = LocalDiTTransformer2DModel.from_config(full.config)
    window.load_state_dict(full.state_dict())
    torch.testing.assert_close(predict(full), predict(window), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(predict(full, side=16), predict(window, side=16), atol=1e-3)


@pytest.mark.parametrize("name", siblings.SIBLINGS)
def test_all_that_is_trained_has_a_gradient(name):
    """Processes that wait for each other's gradients would otherwise refuse."""
    transformer = tiny(name)
    predict(transformer).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable(transformer))


def test_frozen_branch_is_what_conversion_draws():
    """The file that the original would have saved, given the branch of the same seed again, is the same model."""
    transformer = tiny("frozen_branch").eval()
    frozen = {name for name, parameter in transformer.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in transformer.state_dict() if "global_context" in name or "rel_pos_bias" in name}
    again = compare_siblings.converted(transformer, f"seed:{siblings.BRANCH_SEED}")
    ours, theirs = again.state_dict(), transformer.state_dict()
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    for policy in ("seed:1", "fold", "none"):
        assert not predict(compare_siblings.converted(transformer, policy)).allclose(predict(transformer), atol=1e-4)


@pytest.mark.usefixtures("own_process_as_before")
def test_runs_are_read_as_they_were_validated(tmp_path, monkeypatch, capsys):
    """A run of two steps; the tables say of its weights what the run itself said at its end."""
    data, held_out = write_shard(tmp_path / "data"), write_shard(tmp_path / "held_out", samples=5)
    run = tmp_path / "runs" / "frozen_branch"
    changes = {"steps": 2, "checkpoint_every": 2, "validate_every": 1, "architecture": json.dumps(TINY)}
    assert siblings.main(["frozen_branch", *arguments(data, run, validation_root=held_out, **changes)]) == 0
    losses = [row["validation_loss"] for row in rows(run)]

    monkeypatch.setattr(compare_siblings, "accuracies", lambda transformer, pictures: [float(pictures)] * 5)
    compare_siblings.main([str(tmp_path / "runs"), "--plot", str(tmp_path / "plot.png"), "--pictures", "3"])
    said = capsys.readouterr().out
    assert f"| 2 | {losses[-1]:.5f} | 3.0% |" in said
    assert f"| `seed:0` | {losses[-1]:.5f} | 3.0% |" in said
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    trained = read_transformer(str(run))
    assert compare_siblings.loss_of(trained, run) == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.usefixtures("own_process_as_before")
def test_accuracy_curve_judges_the_averages_of_the_checkpoints_in_their_order(tmp_path, monkeypatch, capsys):
    data, run = write_shard(tmp_path / "data"), tmp_path / "run"
    changes = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9, "architecture": json.dumps(TINY)}
    assert siblings.main(["window_global", *arguments(data, run, **changes)]) == 0
    judged = []

    def accuracies(transformer, pictures):
        judged.append(transformer.proj_out.weight.detach().clone())
        return [10.0 * len(judged)] * 5

    monkeypatch.setattr(accuracy_curve, "accuracies", accuracies)
    accuracy_curve.main([str(run), "--every", "2", "--plot", str(tmp_path / "plot.png")])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[:2] for line in said[-2:]] == [["| 2", " 10.0%"], ["| 3", " 20.0%"]]
    for step, weight in zip((2, 3), judged, strict=True):
        folder = run / "checkpoints" / f"step_{step:08d}" / "transformer"
        average = LocalDiTTransformer2DModel.from_pretrained(folder, variant="ema")
        assert weight.equal(average.proj_out.weight)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        accuracy_curve.main([str(tmp_path / "data")])
    assert "there are no checkpoints in" in capsys.readouterr().err


def test_new_blocks_of_a_grown_transformer_add_their_gated_input_alone_and_learn():
    trained = tiny("window_global", num_layers=5)
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(trained.adaln_single.linear.weight)  # leaves gates to the blocks' own tables
    torch.nn.init.zeros_(trained.adaln_single.linear.bias)
    grown = grow(trained, 3)
    assert grown.config.num_layers == 8
    mate = grown.transformer_blocks[2].ff.net[0].proj.weight  # of the same window shift
    assert torch.equal(grown.transformer_blocks[6].ff.net[0].proj.weight, mate)

    predict(grown).square().mean().backward()
    for block in grown.transformer_blocks[5:]:
        for output in (block.attn.to_out[0], block.cross_attn.to_out[0], block.ff.net[2]):
            assert output.weight.grad.abs().max() > 0
        torch.nn.init.zeros_(block.scale_shift_table.data[2])
    torch.testing.assert_close(predict(grown), predict(trained), rtol=1e-5, atol=1e-6)

    with pytest.raises(ValueError, match="copies the one 4 before it, and this transformer has only 2 blocks"):
        grow(tiny("window_global"), 1)


def test_growing_writes_a_transformer_or_says_why_not(tmp_path, capsys):
    tiny("window_global", num_layers=4).save_pretrained(tmp_path / "trained")

    def run(source: str, *options: str) -> None:
        grow_main(["--transformer", str(tmp_path / source), "--output", str(tmp_path / "grown"), *options])

    run("trained", "--blocks", "1")
    with pytest.raises(SystemExit):
        run("trained")
    assert "grown exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(".", "--overwrite")
    assert "holds no transformer" in capsys.readouterr().err
    assert read_transformer(str(tmp_path / "grown")).config.num_layers == 5
    run("trained", "--blocks", "2", "--overwrite")
    assert read_transformer(str(tmp_path / "grown")).config.num_layers == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "trained"]
