"""The command `localdit`: pictures from prompts and from pictures, conversion, and what a model is made of."""

import argparse
import itertools
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from diffusers.utils.torch_utils import get_device
from PIL import Image

from . import __version__, conversion, demo, hub
from .checkpoint_io import one_line, written_whole
from .command import Parser, fail
from .demo.examples import examples_of
from .key_mapping import DTYPES
from .loading import (
    PICTURE_DTYPES,
    PIPELINE_ARGUMENTS,
    default_dtype,
    default_settings,
    load_pipeline,
    usable_device,
)
from .model_info import BUNDLED_NAME, describe, locate
from .pipeline_localdit import LocalDiTPipeline
from .pipeline_localdit_img2img import LocalDiTImg2ImgPipeline
from .png_settings import picture_digest, read_settings, settings_chunks
from .precision import why_not_int8

PROG = "localdit"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main(argv: list[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv (`list[str]`, *optional*): The arguments; those of the process by default.

    Returns:
        `int`: The exit code: 0, 1 for a fault of ours, 2 for what the user can put right, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # has its own arguments, and takes seconds to import
        from .training.train import main as train

        return train(argv[1:], prog="localdit train")
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return fail(PROG, "interrupted", 130, args.debug)
    except (ValueError, OSError) as error:  # what a user can put right
        return fail(PROG, one_line(error), 2, args.debug)
    except torch.OutOfMemoryError:
        return fail(PROG, "out of memory: try --offload group, --dtype bfloat16 or a smaller size", 2, args.debug)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {one_line(error)}; run with --debug and report it"
        return fail(PROG, message, 1, args.debug)
    return 0


# Arguments


def text(value: str) -> str:
    value.encode()  # bytes that are no UTF-8 reach us as surrogates, which the tokenizer refuses
    return value


def positive(value: str) -> int:
    if int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return int(value)


def finite(value: str) -> float:
    if not math.isfinite(float(value)):
        raise argparse.ArgumentTypeError(f"{value} is no finite number")
    return float(value)


def seed_number(value: str) -> int:
    if not 0 <= int(value) < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not from 0 to 2**63 - 1")
    return int(value)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, run, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    command = add_command("generate", generate, "make pictures of what prompts say")
    add_picture_arguments(command, default_size="the model's")

    command = add_command("img2img", image_to_image, "make pictures of what prompts say that look like a given one")
    command.add_argument("image", metavar="IMAGE", help="file or URL of the picture to start from")
    add_picture_arguments(command, default_size="that of IMAGE")
    command.add_argument("--strength", type=finite, help="how much to change, above 0 and up to 1")

    command = add_command("convert", conversion.run, "convert an original checkpoint, or back")
    conversion.add_arguments(command)

    command = add_command("precompute", precompute, "encode pictures and captions to train from")
    add_precompute_arguments(command)

    add_command("train", run=None, summary="train from pictures and captions, or what precompute made of them")

    command = add_command("publish", hub.run, "publish a model as a repository of the Hub")
    hub.add_arguments(command)

    command = add_command("demo", demo.run, "make pictures in a browser")
    demo.add_arguments(command)

    command = add_command("info", info, "say what a model is made of")
    command.add_argument("model", metavar="MODEL", nargs="?", default=BUNDLED_NAME, help=f"default: {BUNDLED_NAME}")
    return parser


def add_picture_arguments(command: argparse.ArgumentParser, default_size: str) -> None:
    prompts = command.add_argument("prompts", metavar="PROMPT", type=text, nargs="+", help="what to draw")
    # Not required with --like. `nargs="*"` would not do: it takes nothing where the prompt comes after an option.
    prompts.required = False
    command.add_argument("--negative-prompt", type=text, metavar="TEXT", help="what to steer away from")
    command.add_argument("--height", type=positive, metavar="PIXELS", help=f"default: {default_size}")
    command.add_argument("--width", type=positive, metavar="PIXELS", help=f"default: {default_size}")
    command.add_argument("--steps", type=positive, metavar="N", help="denoising steps")
    command.add_argument(
        "--guidance-scale",
        type=finite,
        metavar="X",
        help="how closely to follow the prompt (default: as the model's first example picture, else the pipeline's)",
    )
    command.add_argument(
        "--seed",
        type=seed_number,
        metavar="N",
        help="seed of the first picture, one more for each further one (default: random)",
    )
    command.add_argument("--num-images", type=positive, metavar="N", default=1, help="pictures of each prompt")
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE_OR_DIR",
        default=Path("out"),
        help="a .png, .jpg or .webp file, which is replaced, or a folder, where nothing is replaced; only PNG files "
        "carry the settings (default: %(default)s)",
    )
    command.add_argument(
        "--like", metavar="FILE.png", help="repeat this picture exactly, but for what is given on the command line"
    )
    command.add_argument("--model", metavar="DIR_OR_REPO", help=f"folder or repository id (default: {BUNDLED_NAME})")
    command.add_argument(
        "--dtype",
        choices=PICTURE_DTYPES,
        help="int8 is for CPUs (default: bfloat16 where the device has instructions for it, float32 elsewhere)",
    )
    command.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    command.add_argument(
        "--offload",
        choices=["none", "model", "group", "sequential", "disk"],
        default="none",
        help="keep on the accelerator only the model that is running, or the layer, with the next one on its way "
        "(group: more of the computer's memory) or alone (sequential); or, on a CPU, read the text encoder from disk "
        "layer by layer",
    )
    command.add_argument(
        "--vae-tile",
        type=positive,
        metavar="PIXELS",
        help="decode large pictures in tiles of this side, blended where they overlap: takes less memory",
    )


def add_precompute_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("data_root", metavar="DATA_ROOT", help="pictures and captions, as for training")
    command.add_argument("output", metavar="OUTPUT", help="folder for tar shards; run again to go on")
    command.add_argument(
        "--pipeline",
        metavar="DIR_OR_REPO",
        default=BUNDLED_NAME,
        help="has the VAE and the text encoder (default: %(default)s)",
    )
    command.add_argument(
        "--image-size",
        type=positive,
        metavar="PIXELS",
        required=True,
        help="side of the square pictures, or of a square of the same area",
    )
    command.add_argument(
        "--aspect-ratio-buckets", action="store_true", help="keep the pictures' shapes about as they are"
    )
    command.add_argument("--crop", choices=["center", "random"], default="center", help="default: %(default)s")
    command.add_argument("--samples-per-shard", type=positive, metavar="N", default=1000, help="default: %(default)s")
    command.add_argument("--seed", type=seed_number, metavar="N", default=0, help="of random crops")
    command.add_argument("--batch-size", type=positive, metavar="N", default=16, help="default: %(default)s")
    command.add_argument("--dtype", choices=list(DTYPES.values()), default="float32", help="default: %(default)s")
    command.add_argument("--device", default=get_device(), help="default: the accelerator if there is one, else cpu")
    command.add_argument("--num-workers", type=int, metavar="N", default=2, help="processes that read pictures")


# Commands


def generate(args: argparse.Namespace) -> None:
    settings = requested_settings(args)
    if "image_sha256" in settings:
        command = f"localdit img2img IMAGE --like {args.like}"
        raise ValueError(f"{args.like} was made from a picture; repeat it with: {command}")
    make_pictures(args, settings, LocalDiTPipeline)


def image_to_image(args: argparse.Namespace) -> None:
    settings = requested_settings(args)
    try:
        image = load_image(args.image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{args.image} has too many pixels: {error}") from error
    digest = picture_digest(image)
    if args.like is not None and "image_sha256" not in settings:
        command = f"localdit generate --like {args.like}"
        raise ValueError(f"{args.like} was made without a picture to start from; repeat it with: {command}")
    if settings.get("image_sha256", digest) != digest:
        raise ValueError(f"{args.like} was made from {settings.get('image')!r}, whose pixels {args.image} has not")
    settings |= {"image": Path(args.image).name, "image_sha256": digest}
    make_pictures(args, settings, LocalDiTImg2ImgPipeline, image=image)


def precompute(args: argparse.Namespace) -> None:
    from .training.precompute import precompute as encode_all  # here, so that the other commands start without it

    usable_device(args.device)
    encode_all(**{name: value for name, value in vars(args).items() if name not in ("run", "debug")})
    print(args.output)


def info(args: argparse.Namespace) -> None:
    print(describe(args.model))


# Making pictures


def requested_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings by name: what the command line says, else what the picture to repeat says, else our defaults."""
    recorded = read_settings(args.like) if args.like is not None else {}
    names = (*PIPELINE_ARGUMENTS, "seed", "model", "dtype", "device", "vae_tile")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    settings = {"model": BUNDLED_NAME, "device": get_device(), "seed": random.randrange(2**32)} | recorded | given

    device = usable_device(settings["device"])
    if args.offload in ("model", "group", "sequential") and device.type == "cpu":
        raise ValueError(f"--offload {args.offload} needs an accelerator, but the device is cpu")
    if args.offload == "disk" and device.type != "cpu":
        raise ValueError(f"--offload disk is for CPUs, but the device is {device}; choose group")
    settings.setdefault("dtype", default_dtype(device))
    if settings["dtype"] not in PICTURE_DTYPES:
        raise ValueError(f"{args.like} has the dtype {settings['dtype']!r}; choose one with --dtype")
    if settings["dtype"] == "int8" and (reason := why_not_int8(device)):
        raise ValueError(reason)
    source = locate(settings["model"])
    if settings["model"] != BUNDLED_NAME:
        settings["model"] = str(source)
    examples = examples_of(settings["model"]) if isinstance(source, Path) else []
    if examples and "guidance_scale" in examples[0].settings:
        # As in the demo: what suits the model, which may be far from the pipeline's default.
        settings.setdefault("guidance_scale", examples[0].settings["guidance_scale"])
    if args.prompts is None and "prompt" not in settings:
        raise ValueError("give a PROMPT, or a picture to repeat with --like")
    return settings


def make_pictures(
    args: argparse.Namespace, settings: dict[str, Any], pipeline_class: type[DiffusionPipeline], **inputs: Any
) -> None:
    """
    Makes and writes the pictures, each from a seed of its own and by a call of its own: in a larger batch the last
    digits differ, and no picture could be repeated without the others.
    """
    prompts = [prompt for prompt in args.prompts or [settings["prompt"]] for _ in range(args.num_images)]
    single_file = is_single_file(args.output, len(prompts))

    pipe = load_pipeline(pipeline_class, settings, args.offload)
    made_by = {"scheduler": type(pipe.scheduler).__name__, "version": __version__}
    for name, value in made_by.items():
        if settings.get(name, value) != value:
            print(f"{args.like} was made with {name} {settings[name]}, but this is {value}", file=sys.stderr)
    defaults = default_settings(pipe)
    arguments = {PIPELINE_ARGUMENTS[name]: settings[name] for name in defaults if name in settings}

    for i, prompt in enumerate(prompts):
        seed = settings["seed"] + i
        path = args.output if single_file else free_path(args.output, prompt, seed)
        print(f"[{i + 1}/{len(prompts)}] {prompt!r}, seed {seed}", file=sys.stderr)
        with written_whole(path, overwrite=single_file) as unfinished:
            generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
            image = pipe(prompt=prompt, generator=generator, **arguments, **inputs).images[0]
            made = {"prompt": prompt, "seed": seed, "height": image.height, "width": image.width}
            save_picture(image, unfinished, defaults | settings | made_by | made)
        print(path, flush=True)


# Files


def is_single_file(output: Path, num_pictures: int) -> bool:
    """Whether `--output` is a picture's file and not a folder for pictures."""
    if output.is_dir():
        return False
    suffix = output.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        if num_pictures > 1:
            raise ValueError(f"--output {output} is one file for {num_pictures} pictures; give a folder")
        return True
    if suffix in Image.registered_extensions():
        raise ValueError(f"--output {output} ends in {suffix}; expected {', '.join(PICTURE_SUFFIXES)}, or a folder")
    return False


def free_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name that says what is in the picture and is not taken."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "picture"
    names = itertools.chain([f"{words}-{seed}.png"], (f"{words}-{seed}-{n}.png" for n in itertools.count(2)))
    return next(folder / name for name in names if not (folder / name).exists())


def save_picture(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    if path.suffix.lower() == ".png":
        image.save(path, pnginfo=settings_chunks(settings))
    else:
        image.save(path, quality=95)
