"""The settings of a training run: one table of fields, filled from a preset, a YAML file and the command line."""

import argparse
import dataclasses
import difflib
import math
import typing
from pathlib import Path
from typing import Any

import yaml

from ..command import Parser

PRESETS = Path(__file__).parent / "presets"
# What may differ when a run is resumed. All else decides what the run computes.
CHANGEABLE = {
    "batch_size",  # but not its product with the number of processes
    "checkpoint_every",
    "compile",
    "decay_steps",
    "gradient_checkpointing",
    "init_from",
    "keep_checkpoints",
    "kernels",
    "num_workers",
    "output",
    "steps",
    "text_tokens",
    "tracker",
    "validate_every",
    "validation_prompts",
    "validation_root",
    "validation_samples",
}


def option(default: Any, summary: str, choices: tuple[str, ...] | None = None, minimum: float | None = None) -> Any:
    return dataclasses.field(
        default_factory=default if callable(default) else lambda: default,
        metadata={"summary": summary, "choices": choices, "minimum": minimum},
    )


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """
    Everything that a run is told. The defaults are the recipe of the released LocalDiT, at 512 pixels.

    Raises:
        `ValueError`: A value is of the wrong kind or out of range.
    """

    data_root: str | None = option(
        None, "folder of pictures and captions, tar shards (file, glob, {000..012}, URL), or a data set's name"
    )
    output: str = option("out/train", "folder for checkpoints, metrics and pictures; run again to resume")
    pipeline: str | None = option(
        None, "folder or repository id of text encoder and VAE (default: what the shards were made with)"
    )
    init_from: str | None = option(
        None, "weights to start from: a transformer, pipeline or run of any resolution (default: random)"
    )
    architecture: dict[str, Any] = option(dict, "the transformer's configuration, as {num_layers: 6, ...}")  # noqa: RUF009

    image_size: int = option(512, "side in pixels of the pictures, or of a square of the same area", minimum=16)
    aspect_ratio_buckets: bool = option(False, "keep the pictures' shapes about as they are, instead of squares")
    crop: str = option("center", "where pictures are cut to size", choices=("center", "random"))
    caption_dropout: float = option(0.1, "share of the samples that are trained without caption", minimum=0)
    num_workers: int = option(2, "processes that read data, for each training process", minimum=0)

    steps: int = option(100_000, "optimizer steps to train for", minimum=1)
    batch_size: int = option(4, "samples per process", minimum=1)
    gradient_accumulation_steps: int = option(1, "batches per step", minimum=1)
    learning_rate: float = option(2e-5, "at its highest", minimum=0)
    lr_schedule: str = option(
        "constant_with_warmup",
        "after the warm-up",
        choices=("constant_with_warmup", "linear", "cosine", "warmup_stable_decay"),
    )
    warmup_steps: int = option(1000, "steps until the learning rate is at its highest", minimum=0)
    decay_steps: int = option(0, "last steps, in which warmup_stable_decay brings it to 0", minimum=0)
    optimizer: str = option(
        "adamw",
        "muon is for the blocks' matrices, with AdamW for the rest; adamw_8bit needs bitsandbytes",
        choices=("adamw", "adamw_8bit", "muon"),
    )
    adam_beta2: float = option(0.999, "of AdamW", minimum=0)
    weight_decay: float = option(0.03, "of the optimizer", minimum=0)
    max_grad_norm: float | None = option(
        0.01, "where the norm of the gradient is cut; none for gradients as they are", minimum=0
    )
    ema_decay: float | None = option(0.9999, "of the average of the weights; none for no average", minimum=0)
    logit_normal_timesteps: float = option(0.0, "share of timesteps around the middle; others are uniform", minimum=0)
    snr_gamma: float | None = option(None, "weight the loss by min-SNR with this gamma", minimum=0)
    p2_gamma: float | None = option(None, "weight the loss by 1 / SNR to this power", minimum=0)
    noise_offset: float = option(0.0, "further standard deviation of the means of the noise", minimum=0)
    lora_rank: int | None = option(None, "train low-rank adapters of this rank, and nothing else", minimum=1)
    seed: int = option(0, "of the initial weights and of all that is random about a sample", minimum=0)

    mixed_precision: str = option("bf16", "in which to compute; weights are float32", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "less memory, more computation")
    kernels: bool = option(True, "self-attention by the Triton kernels, on an NVIDIA GPU and in half precision")
    compile: bool = option(False, "compile the transformer's blocks; all captions are padded then")
    text_tokens: int = option(120, "length in tokens to which --compile pads captions", minimum=1)

    checkpoint_every: int = option(1000, "steps", minimum=1)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", minimum=1)
    validate_every: int = option(1000, "steps between validation losses, pictures and plots", minimum=1)
    validation_root: str | None = option(
        None, "data for the validation loss, of the kind of --data-root, which it is by default"
    )
    validation_samples: int = option(8, "how many of them, the first, it is computed on", minimum=0)
    validation_prompts: list[str] = option(list, "what the validation pictures show")  # noqa: RUF009
    tracker: str | None = option(
        None, "where metrics are sent besides metrics.jsonl", choices=("tensorboard", "wandb", "trackio")
    )

    def __post_init__(self):
        for field in FIELDS.values():
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in ("caption_dropout", "adam_beta2", "ema_decay", "logit_normal_timesteps"):
            if (getattr(self, name) or 0) > 1:
                raise ValueError(f"{name} must be from 0 to 1 but is {getattr(self, name)}")
        if self.adam_beta2 == 1:
            raise ValueError("adam_beta2 must be less than 1: AdamW would divide by 0")
        for name in ("max_grad_norm", "snr_gamma"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be more than 0, or none, but is 0, with which nothing is learnt")
        if self.snr_gamma is not None and self.p2_gamma is not None:
            raise ValueError("snr_gamma and p2_gamma are two ways to weight the same loss: set one of them to none")

    def replace(self, **changes: Any) -> "TrainingSettings":
        """
        These settings with some changed. A change of `architecture` is laid over what is there.

        Raises:
            `ValueError`: There is no such setting (the nearest is named), or a value is wrong.
        """
        for name in changes:
            if name not in FIELDS:
                raise ValueError(f"there is no setting {name!r}{nearest(name, FIELDS)}")
        if isinstance(changes.get("architecture"), dict):
            changes["architecture"] = self.architecture | changes["architecture"]
        return dataclasses.replace(self, **changes)

    def check_resumes(self, started: dict[str, Any], now: dict[str, Any]) -> None:
        """
        Make sure that a run that was started otherwise can go on with these settings.

        Args:
            started (`dict[str, Any]`):
                `settings` by name, `global_batch_size` (samples in a batch of all processes together), `data`, the
                fingerprint of the source, and `optimizer_state`, in what pieces it is, then ...
            now (`dict[str, Any]`): ... and now.

        Raises:
            `ValueError`: The data or a setting that decides what the run computes has changed, or the processes cannot
                load the optimizer's state.
        """
        began = f"the run in {self.output} was started with"
        for name, value in dataclasses.asdict(self).items():
            before = started["settings"].get(name, value)
            if name not in CHANGEABLE and before != value:
                raise ValueError(
                    f"{began} {name}: {before}, but now it is {value}; put it back, or give another --output"
                )
        if started["global_batch_size"] != now["global_batch_size"]:
            raise ValueError(
                f"{began} batches of {started['global_batch_size']} samples in all, but now --batch-size times"
                f" processes is {now['global_batch_size']}; put it back, or give another --output"
            )
        if started["data"] != now["data"]:
            raise ValueError(
                f"{began} other samples than {self.data_root} holds now; put them back, or give another --output (and"
                f" --init-from {self.output} to go on with its weights)"
            )
        after = now["optimizer_state"]
        before = started.get("optimizer_state", after)
        if before != after:
            raise ValueError(
                f"{began} the optimizer's state {before}, but now it is {after}; put the launcher's configuration"
                f" back, or give another --output (and --init-from {self.output} to go on with its weights)"
            )


FIELDS = {field.name: field for field in dataclasses.fields(TrainingSettings)}
KINDS = typing.get_type_hints(TrainingSettings)
METAVARS = {str: "NAME", int: "N", float: "X", dict[str, Any]: "YAML"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--debug`, `--preset`, `--config`, `--dry-run` and one option for each field."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(preset_names())}")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings, laid over the preset")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    for field in FIELDS.values():
        flag = f"--{field.name.replace('_', '-')}"
        default = f" (default: {field.default_factory()})" if field.default_factory() not in (None, [], {}) else ""
        arguments = {"default": None, "help": (field.metadata["summary"] + default).replace("%", "%%")}
        if KINDS[field.name] is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif KINDS[field.name] == list[str]:
            arguments |= {"nargs": "*", "metavar": "TEXT"}
        else:
            arguments["metavar"] = "|".join(field.metadata["choices"] or [METAVARS[_kind(field.name)]])
        parser.add_argument(flag, **arguments)


def resolve(args: argparse.Namespace) -> TrainingSettings:
    """The defaults, over them the preset, over it the file, over it the command line."""
    settings = TrainingSettings()
    if args.preset is not None:
        if args.preset not in preset_names():
            raise ValueError(f"there is no preset {args.preset!r}; the presets are {', '.join(preset_names())}")
        settings = settings.replace(**_read_yaml(PRESETS / f"{args.preset}.yaml"))
    if args.config is not None:
        try:
            settings = settings.replace(**_read_yaml(args.config))
        except ValueError as error:
            raise ValueError(f"{args.config}: {error}") from error
    given = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    if "architecture" in given:
        given["architecture"] = _parse_yaml(given["architecture"])
    return settings.replace(**given)


class TrainingParser(Parser):
    """Names the option nearest to an unknown one."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"there is no option {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}")
        return parsed


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def nearest(name: str, names: typing.Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _parse_yaml(text)


def _parse_yaml(text: str) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"this is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(parsed or {}, dict) or not all(isinstance(key, str) for key in parsed or {}):
        raise ValueError(f"expected YAML of the form `name: value`, but found {text.strip()[:60]!r}")
    return parsed or {}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as the kind that the field wants. Numbers may be text: YAML 1.1 reads 2e-5 as such."""
    kind, optional = _kind(field.name), type(None) in typing.get_args(KINDS[field.name])
    if optional and value in (None, "none"):
        return None
    expected = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        list[str]: "a list of texts",
        dict[str, Any]: "of the form {name: value, ...}",
    }[kind]
    try:
        if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
            number = kind(value)
            if not math.isfinite(number) or (not isinstance(value, str) and number != value):
                raise ValueError
            value = number
        elif not _is_a(kind, value):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{field.name} must be {expected}{' or none' if optional else ''} but is {value!r}") from None
    minimum, choices = field.metadata["minimum"], field.metadata["choices"]
    if minimum is not None and value < minimum:
        raise ValueError(f"{field.name} must be at least {minimum} but is {value}")
    if choices is not None and value not in choices:
        raise ValueError(f"{field.name} must be one of {', '.join(choices)} but is {value!r}{nearest(value, choices)}")
    return value


def _kind(name: str) -> Any:
    """What a field holds, if it is not `None`."""
    kind = KINDS[name]
    return typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind


def _is_a(kind: Any, value: Any) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, typing.get_origin(kind) or kind)
