"""Where settings come from, and what is said of wrong ones."""

import argparse
import dataclasses

import pytest
import yaml

from diffusers_localdit.training.settings import (
    CHANGEABLE,
    FIELDS,
    PRESETS,
    TrainingParser,
    TrainingSettings,
    add_arguments,
    preset_names,
    resolve,
)


def settings_of(*arguments) -> TrainingSettings:
    parser = TrainingParser(prog="train")
    add_arguments(parser)
    return resolve(parser.parse_args([str(argument) for argument in arguments]))


def test_defaults_are_the_reference_recipe():
    settings = settings_of()
    assert (settings.learning_rate, settings.weight_decay, settings.max_grad_norm) == (2e-5, 0.03, 0.01)
    assert (settings.warmup_steps, settings.caption_dropout, settings.mixed_precision) == (1000, 0.1, "bf16")
    assert (settings.snr_gamma, settings.noise_offset, settings.lora_rank) == (None, 0.0, None)
    assert (settings.p2_gamma, settings.logit_normal_timesteps) == (None, 0.0)


@pytest.mark.parametrize("name", preset_names())
def test_presets(name):
    settings = settings_of("--preset", name)
    written = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    assert written  # says something
    assert {key for key in written if getattr(settings, key) == getattr(TrainingSettings(), key)} <= {
        "learning_rate",
        "image_size",
        "ema_decay",
        "batch_size",
    }, "a preset repeats a default"


def test_there_are_the_presets_that_are_asked_for():
    assert preset_names() == ["1024", "256", "512", "lora", "shapes"]


def test_later_sources_win(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 3e-4\nbatch_size: 5\narchitecture: {num_layers: 3}\n")
    settings = settings_of(
        *("--preset", "shapes", "--config", config),
        *("--batch-size", 7, "--ema-decay", "none", "--no-compile", "--architecture", "{num_attention_heads: 2}"),
        *("--validation-prompts", "a cat", "a dog"),
    )
    assert settings.steps == settings_of("--preset", "shapes").steps  # of the preset
    assert settings.learning_rate == 3e-4  # of the file: YAML 1.1 reads 3e-4 as text
    assert (settings.batch_size, settings.ema_decay, settings.compile) == (7, None, False)  # of the command line
    assert settings.architecture["num_layers"] == 3 and settings.architecture["num_attention_heads"] == 2
    assert settings.architecture["caption_channels"] == 96
    assert settings.validation_prompts == ["a cat", "a dog"]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_given_on_the_command_line(name):
    field = FIELDS[name]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(getattr(TrainingSettings(), name), bool):
        assert getattr(settings_of(flag), name) is True
        return
    choices = field.metadata["choices"]
    if choices:
        assert getattr(settings_of(flag, choices[-1]), name) == choices[-1]
    elif name == "architecture":
        assert settings_of(flag, "{num_layers: 9}").architecture == {"num_layers": 9}
    elif name == "validation_prompts":
        assert settings_of(flag, "text").validation_prompts == ["text"]
    elif field.metadata["minimum"] is None:
        assert getattr(settings_of(flag, "text"), name) == "text"
    else:
        number = (
            "32" if name not in ("caption_dropout", "adam_beta2", "ema_decay", "logit_normal_timesteps") else "0.5"
        )
        assert getattr(settings_of(flag, number), name) == float(number)


def refusal(capsys, *arguments) -> str:
    with pytest.raises((ValueError, SystemExit)) as raised:
        settings_of(*arguments)
    return capsys.readouterr().err if isinstance(raised.value, SystemExit) else str(raised.value)


class TestRefusals:
    def test_wrong_key_in_a_file_names_the_nearest(self, tmp_path, capsys):
        config = tmp_path / "mine.yaml"
        config.write_text("learning_rte: 1\n")
        message = refusal(capsys, "--config", config)
        assert "mine.yaml" in message and "'learning_rte'" in message and "did you mean 'learning_rate'?" in message

    def test_wrong_option_names_the_nearest(self, capsys):
        message = refusal(capsys, "--gradient-checkpoint")
        assert "'--gradient-checkpoint'" in message and "did you mean '--gradient-checkpointing'?" in message

    def test_wrong_preset_lists_them(self, capsys):
        assert "256" in refusal(capsys, "--preset", "257")

    @pytest.mark.parametrize(
        "arguments, parts",
        [
            (("--steps", "many"), ["steps", "whole number", "'many'"]),
            (("--steps", "1.5"), ["steps", "whole number"]),
            (("--steps", "0"), ["steps", "at least 1"]),
            (("--learning-rate", "nan"), ["learning_rate", "number"]),
            (("--learning-rate", "none"), ["learning_rate", "number"]),
            (("--caption-dropout", "1.5"), ["caption_dropout", "0 to 1"]),
            (("--adam-beta2", "1"), ["adam_beta2", "less than 1"]),
            (("--max-grad-norm", "0"), ["max_grad_norm", "more than 0", "none"]),
            (("--snr-gamma", "0"), ["snr_gamma", "more than 0", "none"]),
            (("--snr-gamma", "5", "--p2-gamma", "1"), ["snr_gamma and p2_gamma", "none"]),
            (("--crop", "centre"), ["crop", "center, random", "did you mean 'center'?"]),
            (("--architecture", "3"), ["name: value"]),
            (("--architecture", "{a: "), ["YAML"]),
        ],
    )
    def test_wrong_values(self, arguments, parts, capsys):
        message = refusal(capsys, *arguments)
        assert all(part in message for part in parts), message

    @pytest.mark.parametrize(
        "lowest, names",
        [
            (
                0,
                "caption_dropout num_workers learning_rate warmup_steps decay_steps adam_beta2 weight_decay ema_decay"
                " logit_normal_timesteps p2_gamma noise_offset seed validation_samples",
            ),
            (
                1,
                "steps batch_size gradient_accumulation_steps lora_rank text_tokens checkpoint_every keep_checkpoints"
                " validate_every",
            ),
            (16, "image_size"),
        ],
    )
    def test_lowest_values(self, lowest, names, capsys):
        for name in names.split():
            flag = f"--{name.replace('_', '-')}"
            assert getattr(settings_of(flag, lowest), name) == lowest
            assert f"{name} must be at least {lowest} but is" in refusal(capsys, f"{flag}={lowest - 1}")

    @pytest.mark.parametrize("content", ["a: b: c", "- 1", "1: 2", b"\xff\xfe\x00"])
    def test_files_that_are_no_settings(self, content, tmp_path, capsys):
        config = tmp_path / "mine.yaml"
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert "mine.yaml" in refusal(capsys, "--config", config)

    def test_missing_file(self, tmp_path, capsys):
        assert "No such file" in refusal(capsys, "--config", tmp_path / "none.yaml")

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("compile", "yes please", "compile must be true or false"),
            ("compile", 1, "compile must be true or false"),
            ("steps", float("inf"), "steps must be a whole number but is inf"),
            ("learning_rate", 10**400, "learning_rate must be a number but is 1000"),
            ("validation_prompts", "a cat", "validation_prompts must be a list of texts but is 'a cat'"),
            ("validation_prompts", ["a cat", 2], "validation_prompts must be a list of texts but is ['a cat', 2]"),
        ],
    )
    def test_kinds_in_files(self, name, value, message, tmp_path, capsys):
        config = tmp_path / "mine.yaml"
        config.write_text(yaml.safe_dump({name: value}))
        assert message in refusal(capsys, "--config", config)


def manifest(settings: TrainingSettings, processes: int = 1, data: str = "these", pieces: str = "whole") -> dict:
    """What a checkpoint remembers."""
    batch = settings.batch_size * processes
    remembered = {"settings": dataclasses.asdict(settings), "global_batch_size": batch}
    return remembered | {"data": data, "optimizer_state": pieces}


class TestResuming:
    def test_same_settings_resume(self):
        settings = settings_of("--preset", "shapes")
        settings.check_resumes(manifest(settings), manifest(settings))

    def test_what_only_says_how_may_change(self):
        started = manifest(settings_of("--steps", 10, "--decay-steps", 1, "--keep-checkpoints", 1))
        now = settings_of("--steps", 20, "--decay-steps", 4, "--keep-checkpoints", 3, "--num-workers", 0)
        now.check_resumes(started, manifest(now))

    @pytest.mark.parametrize(
        "name, value", [("learning_rate", 1.0), ("seed", 3), ("image_size", 64), ("crop", "random")]
    )
    def test_what_is_computed_may_not_change(self, name, value):
        settings = TrainingSettings(output="mine")
        with pytest.raises(ValueError, match=f"mine was started with {name}.*--output"):
            settings.replace(**{name: value}).check_resumes(manifest(settings), manifest(settings))

    def test_batch_of_all_processes_may_not_change(self):
        settings = TrainingSettings(batch_size=4)
        halved = settings.replace(batch_size=2)
        halved.check_resumes(manifest(settings), manifest(halved, processes=2))
        with pytest.raises(ValueError, match="batches of 4 samples"):
            halved.check_resumes(manifest(settings), manifest(halved))

    def test_data_may_not_change(self):
        settings = TrainingSettings(output="mine", data_root="pictures")
        expected = "started with other samples than pictures holds now; .*--output.*--init-from mine"
        with pytest.raises(ValueError, match=expected):
            settings.check_resumes(manifest(settings), manifest(settings, data="others"))

    def test_pieces_of_the_optimizer_may_not_change(self):
        settings = TrainingSettings(output="mine")
        expected = "started with the optimizer's state whole, but now it is halved; .*--output.*--init-from mine"
        with pytest.raises(ValueError, match=expected):
            settings.check_resumes(manifest(settings), manifest(settings, pieces="halved"))

    def test_list_of_what_may_change_names_settings(self):
        assert set(CHANGEABLE) <= FIELDS.keys()


def test_help_can_be_printed(capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    said = parser.format_help()
    assert "--learning-rate X" in said and "--crop center|random" in said and "--ema-decay X" in said
