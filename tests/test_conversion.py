"""Conversion of original checkpoints: nothing is lost, guessed in silence or left half-written."""

import argparse
import fnmatch
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_inputs import GOLDEN, GOLDEN_ORIGINALS, is_dead, tiny_original
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusers_localdit import LocalDiTPipeline, LocalDiTTransformer2DModel
from diffusers_localdit.checkpoint_io import written_whole
from diffusers_localdit.cli import main
from diffusers_localdit.conversion import (
    CheckpointError,
    add_arguments,
    convert_checkpoint,
    convert_state_dict,
    load_original,
    run,
    to_original,
)
from diffusers_localdit.key_mapping import key_table
from diffusers_localdit.state_dict_conversion import original_state_dict, plan_conversion

ROOT = Path(__file__).parents[1]
WINDOW4 = GOLDEN / "window4_global" / "original_with_processor.pt"
golden_originals = pytest.mark.parametrize(
    "path", [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in GOLDEN_ORIGINALS]
)


def read_original(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def golden_options(path: Path) -> dict:
    """What no file tells: the options of a golden original."""
    config = json.loads((path.parent / "case.json").read_text())["config"]
    return {"sample_size": config["sample_size"], "use_rope": config["use_rope"]}


def assert_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class TestWhatTheFileTells:
    @golden_originals
    def test_configuration(self, path):
        expected = json.loads((path.parent / "case.json").read_text())["config"]
        found = load_original(path, window_size=expected["window_size"], **golden_options(path)).config
        if "without_processor" in path.name:
            expected["use_global_context"] = False  # folded
        assert {name: found[name] for name in expected} == expected

    def test_window_size_comes_from_the_bias_tables(self):
        path = GOLDEN / "window8_global" / "original_with_processor.pt"
        assert load_original(path).config.window_size == 8
        with pytest.raises(CheckpointError, match=r"window size 4 contradicts .* for 8"):
            load_original(path, window_size=4)

    def test_window_size_without_tables(self):
        assert convert_state_dict(tiny_original())[1]["window_size"] == 4
        assert convert_state_dict(tiny_original(), window_size=6)[1]["window_size"] == 6

    @pytest.mark.parametrize("sizes", [(4, 4, 2, 8, 3), (3, 8, 4, 24, 6)])
    def test_other_channels_and_patches(self, sizes):
        in_channels, out_channels, patch_size, caption_channels, heads = sizes
        config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "patch_size": patch_size,
            "caption_channels": caption_channels,
            "num_attention_heads": heads,
            "attention_head_dim": 8,
            "num_layers": 3,
        }
        model = LocalDiTTransformer2DModel(**config)
        state_dict, found, _ = convert_state_dict(original_state_dict(model.state_dict()))
        assert {name: found[name] for name in config} == config
        assert_equal_tensors(state_dict, model.state_dict())

    def test_full_size_manifest(self):
        """The table names every key of the released file, and the live model has the released model's size."""
        manifest = json.loads((GOLDEN / "full_size_manifest.json").read_text())
        tensors = {name: torch.empty(shape, device="meta") for name, shape in manifest["state_dict"].items()}
        plan = plan_conversion(tensors)
        with torch.device("meta"):
            model = LocalDiTTransformer2DModel(**plan.config)
            complete = LocalDiTTransformer2DModel()
        assert plan.config == {name: complete.config[name] for name in plan.config} | {"use_global_context": False}
        shapes = {row.original: list(row.join(complete.state_dict()).shape) for row in key_table(18)}
        assert shapes == manifest["state_dict"] | manifest["processor"]
        dead = sum(tensors[row.original].numel() for row in plan.rows if row.part == "dead")
        bias_tables = 18 * 49 * 16  # not in the file, always in the model
        assert (len(tensors), dead, model.num_parameters() - bias_tables) == (545, 119_543_040, 398_780_368)
        assert sum(tensor.numel() for tensor in tensors.values()) == 398_780_368 + 119_543_040


class TestGlobalContext:
    @pytest.mark.parametrize(
        ("parts", "wish", "outcome"),
        [
            (("local", "branch"), "auto", "keep"),
            (("local", "branch"), "keep", "keep"),
            (("local", "branch"), "fold", "fold"),
            (("local", "branch"), "none", None),
            (("local", "branch"), "seed:1", None),
            (("branch",), "auto", "keep"),
            (("local",), "auto", "none"),
            (("local",), "none", "none"),
            (("local",), "keep", None),
            (("local",), "fold", None),
            (("local",), "seed:1", None),
            ((), "auto", "fold"),
            ((), "fold", "fold"),
            ((), "none", "none"),
            ((), "seed:1", "seed"),
            ((), "keep", None),
        ],
    )
    def test_every_wish_on_every_kind_of_file(self, parts, wish, outcome):
        original = tiny_original(*parts)
        if outcome is None:
            possible = "keep, fold" if "branch" in parts else "none" if parts else "fold, none, seed:N"
            refusal = rf"contradicts the file: the file carries .*; possible here: auto, {possible}$"
            with pytest.raises(CheckpointError, match=refusal):
                convert_state_dict(original, global_context=wish)
            return
        state_dict, config, report = convert_state_dict(original, global_context=wish)
        assert report.outcome == outcome
        assert config["use_global_context"] == (outcome in ("keep", "seed"))
        for layer in range(2):
            before, after = f"transformer_blocks.{layer}.attn1.", f"transformer_blocks.{layer}.attn."
            factor = 0.5 if outcome == "fold" else 1.0
            assert torch.equal(state_dict[after + "to_out.0.weight"], original[before + "to_out.0.weight"] * factor)
            assert torch.equal(state_dict[after + "to_out.0.bias"], original[before + "to_out.0.bias"])
            cross = f"transformer_blocks.{layer}.attn2.to_out.0.weight"
            assert torch.equal(state_dict[cross.replace("attn2", "cross_attn")], original[cross])
            expected = original.get(before + "processor.local_rel_pos_bias")
            found = state_dict[after + "rel_pos_bias"]
            assert torch.equal(found, torch.zeros_like(found) if expected is None else expected)
        assert any("global_context" in name for name in state_dict) == config["use_global_context"]
        assert ("bias tables     from the file\n" in str(report)) == ("local" in parts)

    @pytest.mark.parametrize("wish", ["", "Keep", "seed", "seed:", "seed:-1", "seed:x", "keep:1", "seed:1 "])
    def test_unknown_wish(self, wish):
        with pytest.raises(CheckpointError, match="expected auto, keep, fold, none or seed:N"):
            convert_state_dict(tiny_original(), global_context=wish)

    @pytest.mark.parametrize("lost", ["to_global_kv.bias", "query_feat_extract.1.conv.3.weight", "rel_pos_bias"])
    def test_a_partial_branch_is_refused(self, lost):
        original = tiny_original("local", "branch")
        (name, *_) = (name for name in original if name.startswith("transformer_blocks.1.") and name.endswith(lost))
        del original[name]
        with pytest.raises(CheckpointError, match=name):
            convert_state_dict(original)

    def test_the_branch_without_its_bias_tables_gets_zero_ones(self):
        original = {name: value for name, value in tiny_original("branch").items() if "rel_pos_bias" not in name}
        state_dict, _, report = convert_state_dict(original, window_size=2)
        assert (report.outcome, report.zero_tables) == ("keep", 4)
        assert not state_dict["transformer_blocks.1.attn.global_context.rel_pos_bias"].any()

    def test_seed_is_what_the_original_draws_and_leaves_the_random_state_alone(self):
        torch.manual_seed(123)
        before = torch.get_rng_state()
        state_dict, _, _ = convert_state_dict(tiny_original(), global_context="seed:7")
        assert torch.equal(torch.get_rng_state(), before)

        torch.manual_seed(7)
        for layer in range(2):
            branch = f"transformer_blocks.{layer}.attn.global_context"
            key_value = torch.nn.Linear(12, 24)
            for end in ("weight", "bias"):
                drawn = torch.cat([state_dict[f"{branch}.{name}.{end}"] for name in ("to_k", "to_v")])
                assert torch.equal(drawn, getattr(key_value, end))
            for stage in range(2):
                expected = {
                    "depthwise": torch.nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False).weight,
                    "squeeze": torch.nn.Linear(12, 3, bias=False).weight,
                    "excite": torch.nn.Linear(3, 12, bias=False).weight,
                    "pointwise": torch.nn.Conv2d(12, 12, 1, bias=False).weight[:, :, 0, 0],
                }
                for name, weight in expected.items():
                    assert torch.equal(state_dict[f"{branch}.query_stages.{stage}.{name}.weight"], weight)

    def test_equal_seeds_are_equal_and_others_differ(self):
        one, again, other = (
            convert_state_dict(tiny_original(), global_context=f"seed:{seed}")[0] for seed in (7, 7, 8)
        )
        assert_equal_tensors(one, again)
        name = "transformer_blocks.0.attn.global_context.to_k.weight"
        assert not torch.equal(one[name], other[name])

    def test_the_report_says_what_happened_and_why(self):
        assert "folded: the file carries nothing of the branch" in str(convert_state_dict(tiny_original())[2])
        dropped = str(convert_state_dict(tiny_original("local", "branch"), global_context="fold")[2])
        numbers = sum(tensor.numel() for name, tensor in tiny_original("branch").items() if "processor" in name)
        assert f"its {numbers:,} numbers are discarded" in " ".join(dropped.split())
        assert "exact" in str(convert_state_dict(tiny_original("local"))[2])


class TestWrappedFiles:
    @settings(max_examples=30)
    @given(
        prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3),
        wrappers=st.lists(st.sampled_from(["state_dict", "model", "ema"]), max_size=3),
        inside=st.booleans(),
    )
    def test_prefixes_and_wrappers_come_off(self, prefixes, wrappers, inside):
        plain = tiny_original("local", "branch")
        wrapped = {"".join(prefixes) + name: tensor for name, tensor in plain.items()}
        if inside:  # what compiling single blocks leaves
            wrapped = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in wrapped.items()}
        for wrapper in wrappers:
            wrapped = {"epoch": 3, "step": torch.tensor(7), wrapper: wrapped, "optimizer": {"state": [1.0]}}
        assert_equal_tensors(convert_state_dict(wrapped)[0], convert_state_dict(plain)[0])

    def test_several_sets_of_weights_are_named_in_the_report(self):
        checkpoint = {"ema": tiny_original(), "model": tiny_original("local")}
        _, _, report = convert_state_dict(checkpoint)
        assert report.outcome == "none"
        assert report.found_in == "'model' (not 'ema')"
        assert convert_state_dict({"model": tiny_original()})[2].found_in == "'model'"

    def test_extra_entries_beside_unwrapped_tensors_are_an_error(self):
        with pytest.raises(CheckpointError, match="epoch is int; expected a tensor"):
            convert_state_dict({**tiny_original(), "epoch": 3})

    def test_a_name_with_and_without_prefix_is_an_error(self):
        with pytest.raises(CheckpointError, match=r"proj_out.bias is in the file twice"):
            convert_state_dict({**tiny_original(), "module.proj_out.bias": torch.zeros(16)})


class TestOutput:
    @golden_originals
    def test_loads_with_from_pretrained(self, path, tmp_path):
        report = convert_checkpoint(path, tmp_path / "new" / "out", **golden_options(path))
        model = LocalDiTTransformer2DModel.from_pretrained(tmp_path / "new" / "out", subfolder="transformer")
        assert_equal_tensors(model.state_dict(), load_original(path, **golden_options(path)).state_dict())
        assert report.parameters == model.num_parameters()
        original = read_original(path)
        dead = [tensor.numel() for name, tensor in original.items() if is_dead(name)]
        assert (report.kept_keys, report.dead_keys) == (len(original) - len(dead), len(dead))
        assert f"{len(dead)} dropped ({sum(dead):,} numbers" in str(report)
        assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
        assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]

    def test_every_container_gives_the_same_model(self, tmp_path):
        tensors = tiny_original("local", "branch")
        save_file(tensors, tmp_path / "a.safetensors")
        torch.save(tensors, tmp_path / "a.pt")
        torch.save(tensors, tmp_path / "before_1_6.pth", _use_new_zipfile_serialization=False)
        torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
        expected = convert_state_dict(tensors)[0]
        for path in list(tmp_path.iterdir()):
            assert_equal_tensors(load_original(path).state_dict(), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype, tmp_path):
        path = tmp_path / "a.pt"
        torch.save(tiny_original("local", "branch"), path)
        report = convert_checkpoint(path, tmp_path / "out", dtype=dtype)
        weights = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
        for name, tensor in convert_state_dict(tiny_original("local", "branch"))[0].items():
            assert torch.equal(weights[name], tensor.to(dtype))
        assert str(dtype).removeprefix("torch.") == report.dtype

    def test_float16_that_overflows_is_an_error(self):
        original = tiny_original()
        original["proj_out.bias"][3] = 1e5
        with pytest.raises(CheckpointError, match=r"proj_out.bias has 1 .* as float16; choose bfloat16 or float32"):
            convert_state_dict(original, dtype=torch.float16)

    def test_an_existing_output_stays_until_the_new_one_is_complete(self, tmp_path):
        path, output = tmp_path / "a.pt", tmp_path / "out"
        torch.save(tiny_original(), path)
        convert_checkpoint(path, output)
        before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
        with pytest.raises(CheckpointError, match="exists; choose another output or pass --overwrite"):
            convert_checkpoint(path, output)
        torch.save({**tiny_original(), "more": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match="more"):
            convert_checkpoint(path, output, overwrite=True)
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
        torch.save(tiny_original("local"), path)
        convert_checkpoint(path, output, overwrite=True)
        assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} != before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.pt", "out"]

    def test_overwrite_deletes_nothing_that_it_did_not_make(self, tmp_path):
        path = tmp_path / "data" / "a.pt"
        path.parent.mkdir()
        torch.save(tiny_original(), path)
        with pytest.raises(CheckpointError, match="holds no converted model"):
            convert_checkpoint(path, path.parent, overwrite=True)
        with pytest.raises(CheckpointError, match="is no folder"):
            convert_checkpoint(path, path, overwrite=True)
        (path.parent / "model_index.json").write_text("{}")
        with pytest.raises(CheckpointError, match="would be deleted"):
            convert_checkpoint(path, path.parent, overwrite=True)
        assert path.exists()

    def test_an_output_below_a_file_cannot_be_written(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save(tiny_original(), path)
        with pytest.raises(CheckpointError, match=r"cannot write .*: Not a directory"):
            convert_checkpoint(path, path / "out")
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_peak_memory_is_that_of_the_mapped_file(self):
        """Two layers of the released size: what a conversion adds stays near the file; a copy of it would not."""
        benchmark = [sys.executable, ROOT / "benchmarks" / "convert.py", "--layers", "2"]
        process = subprocess.run(benchmark, capture_output=True, text=True, check=True)
        rows = json.loads(process.stdout.splitlines()[-1])
        assert {row["file"].rpartition(".")[2] for row in rows} == {"pt", "safetensors"}
        assert all(row["growth_per_file"] < 1.4 for row in rows), rows


def test_what_cannot_be_written_is_told_from_what_cannot_be_read(tmp_path):
    (tmp_path / "broken.safetensors").write_text("{")
    with pytest.raises(SafetensorError), written_whole(tmp_path / "out"):
        load_file(tmp_path / "broken.safetensors")
    refusal = pytest.raises(CheckpointError, match=r"cannot write .*out: Error while serializing")
    with refusal, written_whole(tmp_path / "out") as unfinished:
        save_file({"a": torch.ones(3)}, unfinished / "nowhere" / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="none"), written_whole(tmp_path / "out"):
        (tmp_path / "none.json").read_text()
    with pytest.raises(OSError, match=r"^a library's own words$"), written_whole(tmp_path / "out"):
        raise OSError("a library's own words")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("moved", [0, 1])
def test_what_is_to_be_replaced_is_put_back(moved, error, tmp_path, monkeypatch):
    """When one of the two renamings does not come off."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    renamed, rename = [], os.rename

    def interrupted_rename(*paths):
        renamed.append(paths)
        if len(renamed) == moved + 1:
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "rename", interrupted_rename)
    with pytest.raises(error), written_whole(tmp_path / "out", overwrite=True) as unfinished:
        unfinished.mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/old"]


class TestWayBack:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @golden_originals
    def test_live_keys_come_back_bit_for_bit(self, path, suffix, tmp_path):
        convert_checkpoint(path, tmp_path / "out", **golden_options(path))
        to_original(tmp_path / "out", tmp_path / f"back{suffix}")
        original, back = read_original(path), read_original(tmp_path / f"back{suffix}")
        assert back.keys() == original.keys()  # strict loading, dead keys included
        for name, tensor in original.items():
            assert back[name].shape == tensor.shape
            assert is_dead(name) or torch.equal(back[name], tensor), name
        for name in filter(is_dead, original):
            block = name.partition(".attn")[0]
            end = name.rpartition(".")[2]
            query, key, value = back[f"{block}.attn1.to_qkv.{end}"].chunk(3)
            both = torch.cat([back[f"{block}.attn2.to_k.{end}"], back[f"{block}.attn2.to_v.{end}"]])
            expected = {"attn1.to_q": query, "attn1.to_k": key, "attn1.to_v": value, "attn2.to_kv": both}
            assert torch.equal(back[name], expected[name.removeprefix(f"{block}.").removesuffix(f".{end}")])

    def test_saved_models_and_state_dicts_too(self, tmp_path):
        model = load_original(WINDOW4)
        model.save_pretrained(tmp_path / "saved")
        to_original(tmp_path / "saved", tmp_path / "from_folder.pt")
        to_original(model.state_dict(), tmp_path / "from_model.safetensors")
        assert_equal_tensors(
            read_original(tmp_path / "from_folder.pt"), read_original(tmp_path / "from_model.safetensors")
        )

    def test_a_model_that_ran_without_the_branch_says_so_in_the_file(self):
        """Only the local tables are written, from which a conversion knows that nothing may be folded."""
        state_dict, _, _ = convert_state_dict(tiny_original(), global_context="none")
        again, _, report = convert_state_dict(original_state_dict(state_dict))
        assert report.outcome == "none"
        assert_equal_tensors(again, state_dict)

    @pytest.mark.parametrize("change", ["missing", "left over", "fused"])
    def test_unmapped_keys_raise(self, change, tmp_path):
        model = load_original(WINDOW4)
        if change == "fused":
            model.fuse_qkv_projections()
        state_dict = model.state_dict()
        if change == "missing":
            del state_dict["proj_out.bias"]
        if change == "left over":
            state_dict["transformer_blocks.0.attn.other"] = torch.zeros(1)
        with pytest.raises(CheckpointError, match=r"lacks 1 keys: proj_out.bias|attn.other|to_qkv"):
            to_original(state_dict, tmp_path / "back.pt")
        assert not any(tmp_path.iterdir())

    def test_outputs_and_inputs_are_checked(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"expected .safetensors, .pt"):
            to_original(tiny_original(), tmp_path / "back.bin")
        with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model.safetensors"):
            to_original(tmp_path, tmp_path / "back.pt")
        (tmp_path / "old.pt").write_text("kept")
        with pytest.raises(CheckpointError, match="exists"):
            to_original(load_original(WINDOW4).state_dict(), tmp_path / "old.pt")
        assert (tmp_path / "old.pt").read_text() == "kept"
        (tmp_path / "folder.pt").mkdir()
        with pytest.raises(CheckpointError, match=r"folder.pt exists and is no file"):
            to_original(load_original(WINDOW4).state_dict(), tmp_path / "folder.pt", overwrite=True)
        assert (tmp_path / "folder.pt").is_dir()

    def test_weights_without_metadata(self, tmp_path):
        state_dict = load_original(WINDOW4).state_dict()
        save_file(state_dict, tmp_path / "diffusion_pytorch_model.safetensors")
        to_original(tmp_path, tmp_path / "back.safetensors")
        assert_equal_tensors(load_original(tmp_path / "back.safetensors").state_dict(), state_dict)


class TestRefusals:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(self, legacy, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        path = tmp_path / "a.pt"
        torch.save({**tiny_original(), "x": Hostile()}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"is refused: its pickle asks for \w+.mkdir"):
            convert_checkpoint(path, tmp_path / "out")
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "a.pt is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer, .* run `git lfs pull`"),
            (b"<html>", "is no complete PyTorch checkpoint"),
        ],
    )
    def test_files_that_are_no_checkpoint_are_named(self, content, message, tmp_path):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")

    def test_messages_are_cut_above_400_characters(self):
        assert str(CheckpointError("ab" * 200)) == "ab" * 200
        assert str(CheckpointError("a" * 310 + "b" * 91)) == "a" * 300 + " ... " + "b" * 90

    def test_no_tensors_and_blocks_with_a_gap(self):
        for empty in ({}, {"model": {}}):
            with pytest.raises(CheckpointError, match="the file holds no tensors"):
                convert_state_dict(empty)
        for blocks, message in (
            (r"0\.", "has 1 transformer_blocks but not number 0$"),
            ("", "has 0 transformer_blocks$"),
        ):
            lost = re.compile(rf"transformer_blocks\.{blocks}")
            with pytest.raises(CheckpointError, match=message):
                convert_state_dict({name: x for name, x in tiny_original().items() if not lost.match(name)})

    def test_full_attention_pixart_is_named(self):
        model = PixArtTransformer2DModel(
            num_attention_heads=3, attention_head_dim=4, num_layers=2, caption_channels=8, cross_attention_dim=12
        )
        with pytest.raises(CheckpointError, match="full-attention PixArt-alpha/Sigma transformer"):
            convert_state_dict(model.state_dict())
        with pytest.raises(CheckpointError, match="full-attention PixArt-alpha/Sigma model in PixArt's own layout"):
            convert_state_dict({"blocks.0.attn.qkv.weight": torch.zeros(36, 12)})

    def test_a_converted_model_is_named(self):
        with pytest.raises(CheckpointError, match="layout of LocalDiTTransformer2DModel already"):
            convert_state_dict(load_original(WINDOW4).state_dict())

    def test_missing_and_extra_keys_are_named(self):
        original = tiny_original()
        for end in ("weight", "bias"):
            del original[f"transformer_blocks.1.ff.net.2.{end}"]
        with pytest.raises(CheckpointError, match=r"lacks 2 keys of a LocalDiT: transformer_blocks.1.ff.net.2.bias, "):
            convert_state_dict(original)
        with pytest.raises(CheckpointError, match=r"3 keys that no LocalDiT has: a.a, a.b, a.c$"):
            convert_state_dict({**tiny_original(), **{f"a.{letter}": torch.zeros(1) for letter in "abc"}})
        extra = {f"y_embedder.{number}": torch.zeros(1) for number in range(5)}
        with pytest.raises(CheckpointError, match=r"5 keys that no LocalDiT has: .*y_embedder.2 and 2 more"):
            convert_state_dict({**tiny_original(), **extra})

    def test_only_live_numbers_have_to_be_finite(self):
        original = tiny_original()
        original["transformer_blocks.0.attn1.to_q.weight"].fill_(torch.nan)
        convert_state_dict(original)
        original["transformer_blocks.0.attn1.to_qkv.weight"][3, :2] = torch.inf
        with pytest.raises(CheckpointError, match=r"attn1.to_qkv.weight has 2 numbers that are NaN"):
            convert_state_dict(original)


class TestSingleFile:
    def load(self, source, **options):
        return LocalDiTTransformer2DModel.from_single_file(source, **options)

    @golden_originals
    def test_equals_the_conversion(self, path):
        options = golden_options(path)
        model, expected = self.load(str(path), **options), load_original(path, **options)
        assert_equal_tensors(model.state_dict(), expected.state_dict())
        assert all(model.config[name] == expected.config[name] for name in ("window_size", "use_rope", "sample_size"))

    def test_options_reach_the_conversion(self):
        path = str(GOLDEN / "sample32" / "original_without_processor.pt")
        model = self.load(path, torch_dtype=torch.bfloat16, global_context="seed:5")
        assert model.dtype == torch.bfloat16
        expected = load_original(path, global_context="seed:5", dtype=torch.bfloat16)
        assert_equal_tensors(model.state_dict(), expected.state_dict())

    def test_wrapped_files_and_dictionaries(self):
        tensors = tiny_original("local", "branch")
        model = self.load({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3})
        assert_equal_tensors(model.state_dict(), convert_state_dict(tensors)[0])

    def test_a_given_configuration_has_to_agree_with_the_file(self, tmp_path):
        path = str(GOLDEN / "sample32" / "original_without_processor.pt")
        convert_checkpoint(path, tmp_path / "out", sample_size=32)
        config = {"config": str(tmp_path / "out"), "subfolder": "transformer"}
        model = LocalDiTTransformer2DModel.from_single_file(path, **config)
        assert_equal_tensors(model.state_dict(), load_original(path, sample_size=32).state_dict())
        with pytest.raises(CheckpointError, match="use_global_context=False but the file makes it True"):
            LocalDiTTransformer2DModel.from_single_file(path, global_context="seed:1", **config)

    def test_a_configuration_of_the_original_is_refused(self):
        with pytest.raises(CheckpointError, match="needs no original_config"):
            self.load(tiny_original(), original_config={"model": {"depth": 2}})

    def test_broken_files_are_refused(self, tmp_path):
        original = tiny_original()
        original["proj_out.bias"][0] = torch.nan
        with pytest.raises(CheckpointError, match=r"proj_out.bias has 1 numbers"):
            self.load(original)

        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"x": Hostile()}, tmp_path / "a.pt")
        with pytest.raises(OSError, match="Unable to load weights"):
            self.load(str(tmp_path / "a.pt"))
        assert not (tmp_path / "ran").exists()


class TestCommandLine:
    """What the script does as a process of its own, and its options in this process."""

    SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"

    def run(self, *arguments):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        run(parser.parse_args([str(argument) for argument in arguments]))

    def test_a_process_prints_the_report(self, tmp_path):
        command = [sys.executable, self.SCRIPT, str(WINDOW4), str(tmp_path / "out")]
        process = subprocess.run(command, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")
        assert "kept (" in process.stdout and str(tmp_path / "out") in process.stdout

    def test_it_fails_with_one_line_and_exit_code_2(self, tmp_path, monkeypatch, capsys):
        torch.save({**tiny_original(), "epoch": print}, tmp_path / "a.pt")
        monkeypatch.setattr(sys, "argv", [str(self.SCRIPT), str(tmp_path / "a.pt"), str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(self.SCRIPT), run_name="__main__")
        output, errors = capsys.readouterr()
        assert (output, errors.count("\n")) == ("", 1)
        assert errors.startswith("localdit: error: ") and "would run code" in errors
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]

    def test_every_option_reaches_the_conversion(self, tmp_path, capsys):
        path = GOLDEN / "window8_global_norope" / "original_without_processor.pt"
        reading = ("--window-size", 8, "--sample-size", 64, "--no-rope", "--global-context", "seed:3")
        self.run(path, tmp_path / "out", *reading, "--dtype", "bfloat16")
        assert "drawn with seed 3" in capsys.readouterr().out
        model = LocalDiTTransformer2DModel.from_pretrained(
            tmp_path / "out", subfolder="transformer", torch_dtype=torch.bfloat16
        )
        expected = load_original(path, 8, 64, use_rope=False, global_context="seed:3", dtype=torch.bfloat16)
        assert_equal_tensors(model.state_dict(), expected.state_dict())
        assert (model.config.window_size, model.config.sample_size, model.config.use_rope) == (8, 64, False)
        self.run(path, tmp_path / "out", "--window-size", 8, "--overwrite")
        assert "folded" in capsys.readouterr().out

    def test_to_original(self, tmp_path, capsys):
        convert_checkpoint(WINDOW4, tmp_path / "out")
        self.run(tmp_path / "out", tmp_path / "back.pt", "--to-original")
        assert capsys.readouterr().out.startswith("228 keys of the original's layout written to ")
        with pytest.raises(CheckpointError, match="--window-size has no meaning with --to-original"):
            self.run(tmp_path / "out", tmp_path / "again.pt", "--to-original", "--window-size", 4)
        written = (tmp_path / "back.pt").read_bytes()
        (tmp_path / "back.pt").write_text("old")
        self.run(tmp_path / "out", tmp_path / "back.pt", "--to-original", "--overwrite")
        assert (tmp_path / "back.pt").read_bytes() == written


class TestPipelineFolder:
    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory):
        from pipeline_fixtures import make_components

        folder = tmp_path_factory.mktemp("source")
        components = make_components(tmp_path_factory.mktemp("made"))
        for name in ("tokenizer", "text_encoder", "vae", "scheduler"):
            components[name].save_pretrained(folder / name)
        (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
        return folder

    def test_output_is_a_whole_pipeline(self, source, tmp_path):
        convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from=source)
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["_class_name"] == "LocalDiTPipeline"
        assert index["transformer"] == ["diffusers_localdit", "LocalDiTTransformer2DModel"]
        assert not list(tmp_path.rglob("*.bin"))
        for file in (file for name in ("tokenizer", "text_encoder", "vae") for file in (source / name).iterdir()):
            copied = tmp_path / "out" / file.parent.name / file.name
            assert file.suffix == ".bin" or copied.read_bytes() == file.read_bytes()

    def test_it_loads_and_runs(self, source, tmp_path):
        assert main(["convert", str(WINDOW4), str(tmp_path / "out"), "--pipeline-from", str(source)]) == 0
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
        assert type(pipe) is LocalDiTPipeline
        assert_equal_tensors(pipe.transformer.state_dict(), load_original(WINDOW4).state_dict())
        pipe.set_progress_bar_config(disable=True)
        settings = {"height": 64, "width": 96, "num_inference_steps": 2, "use_resolution_binning": False}
        latents = pipe("a red circle", output_type="latent", generator=torch.manual_seed(0), **settings).images
        assert latents.shape[0] == 1 and latents.isfinite().all()

    def test_the_scheduler_is_the_releases(self, source, tmp_path):
        convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from=source)
        scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
        released = json.loads((WINDOW4.parent / "case.json").read_text())["sampling"][0]["scheduler"]
        assert {name: scheduler.config[name] for name in released} == released

    def test_classes_come_from_the_sources_index(self, source, tmp_path):
        index = {"_class_name": "PixArtSigmaPipeline", "tokenizer": ["transformers", "T5TokenizerFast"]}
        (source / "model_index.json").write_text(json.dumps(index))
        try:
            convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from=source)
        finally:
            (source / "model_index.json").unlink()
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["tokenizer"] == ["transformers", "T5TokenizerFast"]
        assert index["vae"] == ["diffusers", "AutoencoderKL"]

    def test_components_have_to_be_there_and_fit(self, source, tmp_path):
        original = GOLDEN / "window8_global" / "original_with_processor.pt"  # captions of 16, the encoder makes 32
        with pytest.raises(CheckpointError, match=r"text_encoder has d_model=32 but .* caption_channels=16"):
            convert_checkpoint(original, tmp_path / "out", pipeline_from=source)
        with pytest.raises(CheckpointError, match="text_encoder has d_model=96"):
            convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from="localdit-shapes")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="has no folder text_encoder; expected text_encoder, tokenizer, vae"):
            convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from=tmp_path / "empty")
        (tmp_path / "empty").rmdir()
        shutil.copytree(source, tmp_path / "pickles", ignore=shutil.ignore_patterns("diffusion*.safetensors"))
        with pytest.raises(CheckpointError, match=r"vae has no .safetensors weights"):
            convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from=tmp_path / "pickles")
        assert [entry.name for entry in tmp_path.iterdir()] == ["pickles"]

    def test_a_repository_gives_what_a_folder_gives(self, source, tmp_path, monkeypatch):
        asked = {}

        def snapshot_download(repo_id, allow_patterns):
            asked.update(repo_id=repo_id, allow_patterns=allow_patterns)
            return str(source)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from="someone/pipeline")
        assert asked["repo_id"] == "someone/pipeline"
        files = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
        fetched = {
            file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])
        }
        written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
        assert fetched == {file for file in written if file.startswith(("vae", "text_encoder", "tokenizer"))}

    def test_a_repository_out_of_reach_is_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="nobody/nothing is no folder and no repository within reach"):
            convert_checkpoint(WINDOW4, tmp_path / "out", pipeline_from="nobody/nothing")
        assert not any(tmp_path.iterdir())
