"""
Publishing a model as a Hub repository that loads with this package and without it.

The repository names the package's classes in its `model_index.json` and carries their source files, which diffusers
executes only where the package is missing and the user trusts the repository:

- `LocalDiTPipeline.from_pretrained(id)`, or `DiffusionPipeline.from_pretrained(id)` after `import diffusers_localdit`;
- `DiffusionPipeline.from_pretrained(id, custom_pipeline=id, trust_remote_code=True)`.

VAE and text encoder of the base pipeline become files of the repository, since diffusers loads a pipeline from one
repository only. That neither sends nor stores gigabytes again: the Hub's storage recognises content that it has,
whoever uploaded it first.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    metadata_load,
    parse_local_safetensors_file_metadata,
)
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

from .checkpoint_io import SAFETENSORS_SUFFIX, one_line, read_json, refuse_to_replace, write_json, written_whole
from .key_mapping import DTYPES
from .loading import PIPELINE_ARGUMENTS
from .model_info import DTYPE_NAMES, describe, locate
from .pipeline_folder import COPIED_FILES, add_pipeline

PACKAGE = Path(__file__).parent
TEMPLATES = PACKAGE.parents[1] / "hub_configs"  # of a checkout; they are not installed

# Files of the repository that are sources of the package, unless the template has its own. A component's file is named
# like the package, so that the entry of `model_index.json` means the installed class or, without one, this file.
REMOTE_CODE = {
    "pipeline.py": "pipeline_localdit.py",
    "pipeline_localdit_img2img.py": "pipeline_localdit_img2img.py",
    "transformer/diffusers_localdit.py": "transformer_localdit.py",
    "handler.py": "endpoint_handler.py",
}
LIBRARIES = ("diffusers", "diffusers_localdit", "transformers")
TRANSFORMER = ["diffusers_localdit", "LocalDiTTransformer2DModel"]
TEXT_COMPONENTS = ("text_encoder", "tokenizer")
NO_TEXT_ENCODER = """
**There is no text encoder here.** Pass `text_encoder` and `tokenizer` to `from_pretrained`, or `prompt_embeds` to the
call.
"""
VARIANTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SHARD_SIZE = 5 * 10**9
# The weights that are no variant, in one file or several with an index.
MAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
# What an earlier upload left in a repository and the new one does not have would be loaded, or be in the way.
REPLACED_FILES = ["*.safetensors", "*.json", "*.py", "*.bin"]


class PublishError(ValueError):
    """A repository that cannot be assembled, verified or uploaded."""


def assemble(
    model: str | os.PathLike,
    output: str | os.PathLike,
    repo_id: str,
    template: str | os.PathLike,
    base_pipeline: str | os.PathLike | None = None,
    text_encoder: bool = True,
    dtype: torch.dtype | None = None,
    variants: Collection[str] = (),
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """
    Make the folder that becomes a repository. Only safetensors files, configurations, vocabularies and the pictures in
    `images` are taken over.

    Args:
        model (`str` or `os.PathLike`):
            The folder of a pipeline, or with `base_pipeline` one with the subfolder `transformer`.
        output (`str` or `os.PathLike`):
            The folder to make.
        repo_id (`str`):
            The repository's id, which the card's examples name.
        template (`str` or `os.PathLike`):
            A folder with what is not part of the model: the card (`README.md`, in which `$repo_id`, `$note`,
            `$model_info`, `$parameters` and `$download_size` are filled in), `.gitattributes`, pictures.
            Its JSON files say what the model has to be.
        base_pipeline (`str` or `os.PathLike`, *optional*):
            A folder or repository to take the VAE, text encoder and tokenizer from.
        text_encoder (`bool`, defaults to `True`):
            Whether the text encoder and the tokenizer are part of the repository. Without them the pipelines are
            called with `prompt_embeds`.
        dtype (`torch.dtype`, *optional*):
            What to store all weights in; as they are by default.
        variants (`Collection[str]`, *optional*):
            Of "bf16" and "fp16": copies in half precision to store beside the weights, for
            `from_pretrained(variant=...)`. Variants that `model` has are taken over in any case.
        max_shard_size (`int`, defaults to 5 * 10**9):
            Larger files of weights are split; in bytes.
        overwrite (`bool`, defaults to `False`):
            Whether an `output` that exists is replaced, once the new one is complete.

    Returns:
        `list[dict[str, Any]]`: The card's examples whose pictures `model` does not have. The card does without these.

    Raises:
        `ValueError`: A part is missing, does not fit, or contradicts the template. Nothing is left at `output`.
    """
    model, template = Path(model), Path(template)
    with written_whole(output, overwrite) as folder:
        refuse_to_replace(output, inputs=[model, base_pipeline, template], folder=True)
        folder.mkdir()
        index = _add_components(folder, model, base_pipeline, text_encoder)
        for name, (library, class_name) in index.items():
            if any((folder / name).glob(f"*{SAFETENSORS_SUFFIX}")):
                model_class = getattr(importlib.import_module(library), class_name)
                _convert_weights(folder / name, model_class, dtype, variants, max_shard_size)
        for path in model.glob("images/*.png"):  # the model's examples
            (folder / "images").mkdir(exist_ok=True)
            shutil.copyfile(path, folder / "images" / path.name)
        for name, source in REMOTE_CODE.items():
            shutil.copyfile(PACKAGE / source, folder / name)
        _add_template(folder, template)
        missing = _leave_out_missing_pictures(folder / "README.md")
        _fill_in_card(folder / "README.md", repo_id)
    return missing


def verify(folder: str | os.PathLike) -> None:
    """
    Load a repository's folder with the package and by its own code, each in a process of its own, and compare what
    they sample: text to image and image to image, bit for bit.

    Args:
        folder (`str` or `os.PathLike`): The folder that `assemble` made.

    Raises:
        `PublishError`: It cannot be loaded in one of the ways, or the latents differ.
    """
    program = (PACKAGE / "hub_latents.py").read_text(encoding="utf-8")
    latents = {}
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        for way in ("remote", "installed"):
            output = Path(scratch, f"{way}.safetensors")
            command = [sys.executable, "-c", program, os.path.abspath(folder), way, str(output)]
            process = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
            if process.returncode != 0:
                reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                how = "with the package" if way == "installed" else "by the repository's own code"
                raise PublishError(f"verification failed, loading {how}: {reason}")
            latents[way] = output.read_bytes()
    if latents["installed"] != latents["remote"]:
        raise PublishError("verification failed: the package and the repository's own code give different latents")


def upload(folder: str | os.PathLike, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """
    Upload a folder in one commit. Weights and code that are in the repository but not in the folder are deleted by it.

    Args:
        folder (`str` or `os.PathLike`): The folder that `assemble` made.
        repo_id (`str`): The repository, which is created if it does not exist.
        private (`bool`, defaults to `False`): Whether the repository is private.
        revision (`str`, *optional*): The branch, which is created if it does not exist; the default one by default.

    Returns:
        `str`: Address of the commit.

    Raises:
        `PublishError`: Something failed. The repository is as it was; what arrived is not sent again the next time.
    """
    api = HfApi(library_name="diffusers_localdit")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    head = None
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        head = api.model_info(repo_id, revision=revision)
        if private and not head.private:
            raise PublishError(f"{repo_id} exists and is public; make it private first, or leave out --private")
        present = {sibling.rfilename for sibling in head.siblings}
        left_over = filter_repo_objects(sorted(present - files.keys()), allow_patterns=REPLACED_FILES)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in left_over),
                *(CommitOperationAdd(name, path) for name, path in files.items()),
            ],
            commit_message="Publish with diffusers_localdit",
            revision=revision,
            parent_commit=head.sha,  # refuses to undo what somebody else commits meanwhile
        )
    except PublishError:
        raise
    except Exception as error:  # what the client, its Rust part or the network make of a failure has no common type
        raise PublishError(_upload_failure(error, repo_id, None if head is None else head.sha)) from error
    return commit.commit_url


def _upload_failure(error: Exception, repo_id: str, previous: str | None) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        advice = "log in with `hf auth login`, by a token that may write there, and run the same command again"
    elif status == 412:
        advice = "somebody else committed meanwhile; run the same command again"
    else:
        advice = "run the same command again (what arrived is not sent again), with --overwrite if it has --output"
    intact = "nothing was published" if previous is None else f"the previous revision {previous} is intact"
    return f"the upload to {repo_id} failed ({_causes(error)}); {intact}; {advice}"


def _causes(error: BaseException) -> str:
    """The client wraps what went wrong in an error that only names the file."""
    cause = error.__cause__
    here = one_line(error)
    return here if cause is None or one_line(cause) in here else f"{here} {_causes(cause)}"


def _add_components(
    folder: Path, model: Path, base_pipeline: str | os.PathLike | None, text_encoder: bool
) -> dict[str, list[str]]:
    """Puts the components and `model_index.json` into the folder; returns the library and class of each."""
    if base_pipeline is None:
        index = read_json(model / "model_index.json")
    else:
        _copy_component(model / "transformer", folder / "transformer")
        add_pipeline(folder, base_pipeline, read_json(folder / "transformer" / "config.json"), text_encoder)
        index = read_json(folder / "model_index.json")
    if index.get("transformer", [None, None])[1] != TRANSFORMER[1]:
        raise PublishError(f"{model} is no LocalDiT: its transformer is {index.get('transformer')}")
    index = {name: value for name, value in index.items() if name != "_name_or_path"}
    index |= {"_class_name": "LocalDiTPipeline", "transformer": TRANSFORMER}
    if not text_encoder:
        index |= {name: [None, None] for name in TEXT_COMPONENTS}
    components = {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    for name, (library, class_name) in components.items():
        if library not in LIBRARIES or not name.isidentifier():
            raise PublishError(f"{model} has {name} of {library}.{class_name}; expected one of {', '.join(LIBRARIES)}")
        if base_pipeline is None:
            _copy_component(model / name, folder / name)
    write_json(folder / "model_index.json", index)
    return components


def _copy_component(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise PublishError(f"{source.parent} has no folder {source.name}; expected a saved pipeline")
    target.mkdir()
    for path in (path for pattern in COPIED_FILES for path in source.glob(pattern)):
        shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    if not config_path.exists():
        return
    if not any(target.glob(f"*{SAFETENSORS_SUFFIX}")):
        raise PublishError(f"{source} has no .safetensors weights")
    config = read_json(config_path)
    if config.pop("_name_or_path", None) is not None:  # a path on the machine where it was saved
        write_json(config_path, config)


def _convert_weights(
    folder: Path, model_class: type, dtype: torch.dtype | None, variants: Collection[str], max_shard_size: int
) -> None:
    """Adds variants to a component's folder, and casts and splits its weights, as far as this is asked for."""
    for variant in variants:
        if not any(folder.glob(f"*.{variant}*{SAFETENSORS_SUFFIX}")):
            _save_weights(_load(model_class, folder, VARIANTS[variant]), folder, max_shard_size, variant)

    weights = [path for path in folder.iterdir() if MAIN_WEIGHTS.fullmatch(path.name)]
    files = [path for path in weights if path.suffix == SAFETENSORS_SUFFIX]
    if not files:
        raise PublishError(f"{folder.name} has weights of variants only; save the pipeline without `variant` too")
    if dtype is None and max(path.stat().st_size for path in files) <= max_shard_size:
        return
    stored = parse_local_safetensors_file_metadata(files[0]).parameter_count
    model = _load(model_class, folder, dtype or getattr(torch, DTYPE_NAMES[max(stored, key=stored.get)]))
    for path in weights:
        path.rename(path.with_name(f"{path.name}.replaced"))  # the model may be mapped from them
    _save_weights(model, folder, max_shard_size)
    for path in folder.glob("*.replaced"):
        path.unlink()


def _load(model_class: type, folder: Path, dtype: torch.dtype) -> Any:
    try:
        return model_class.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except Exception as error:  # whatever missing or foreign weights make the libraries raise
        raise PublishError(f"cannot load {folder.name}: {one_line(error)}") from error


def _save_weights(model: Any, folder: Path, max_shard_size: int, variant: str | None = None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        model.save_pretrained(scratch, max_shard_size=max_shard_size, variant=variant)
        for path in Path(scratch).glob("*.safetensors*" if variant else "*"):
            path.replace(folder / path.name)


def _add_template(folder: Path, template: Path) -> None:
    if not (template / "README.md").exists():
        raise PublishError(f"{template} has no README.md for the repository; choose another folder with --template")
    for path in (path for path in template.rglob("*") if path.is_file()):
        target = folder / path.relative_to(template)
        if path.suffix != ".json":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        elif target.parent.exists():  # else of a component that is left out
            _require_agreement(target, path)


def _leave_out_missing_pictures(card: Path) -> list[dict[str, Any]]:
    """Takes pictures that are not there out of the card's examples, and returns these examples."""
    widget = (metadata_load(card) or {}).get("widget", [])
    examples = [example for example in widget if "output" in example]
    missing = [example for example in examples if not (card.parent / example["output"]["url"]).exists()]
    text = card.read_text(encoding="utf-8")
    for example in missing:
        text = text.replace(f"  output:\n    url: {example['output']['url']}\n", "")
    if len(missing) == len(examples):
        text = text.replace("<Gallery />\n", "")
    card.write_text(text, encoding="utf-8")
    return missing


def _fill_in_card(card: Path, repo_id: str) -> None:
    folder = card.parent
    weights = [path for path in folder.glob("*/*.safetensors") if MAIN_WEIGHTS.fullmatch(path.name)]
    metadata = [parse_local_safetensors_file_metadata(path) for path in weights if path.parent.name == "transformer"]
    parameters = sum(sum(file.parameter_count.values()) for file in metadata)
    figures = {
        "repo_id": repo_id,
        "note": "" if (folder / "text_encoder").exists() else NO_TEXT_ENCODER,
        "model_info": describe(str(folder)).split("\n\n", 1)[1],  # without the line that says where it is
        "parameters": f"{parameters / 1e6:,.1f} M",
        "download_size": f"{sum(path.stat().st_size for path in weights) / 1e6:,.1f} MB",
    }
    try:
        text = string.Template(card.read_text(encoding="utf-8")).substitute(figures)
    except (KeyError, ValueError) as error:
        raise PublishError(f"README.md cannot be filled in: {error!r}; known are {', '.join(figures)}") from error
    card.write_text(text, encoding="utf-8")


def _require_agreement(found: Path, expected: Path) -> None:
    """Refuses to publish one model under the name of another."""
    ours, theirs = read_json(found), read_json(expected)
    for key, value in theirs.items():
        if not key.startswith("_") and ours.get(key) not in (value, [None, None]):
            raise PublishError(
                f"the model's {found.parent.name}/{found.name} says {key}={ours.get(key)}, but {expected} says"
                f" {value}; if this is another model, give it a folder of its own with --template"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of publishing on a parser (or subparser), for `run`."""
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a converted or saved pipeline")
    parser.add_argument("--repo-id", metavar="ID", required=True, help="repository on the Hub, like owner/name")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    parser.add_argument("--dry-run", action="store_true", help="assemble and verify, but upload nothing")
    parser.add_argument(
        "--base-pipeline",
        metavar="DIR_OR_REPO",
        help="take vae, text_encoder and tokenizer from this pipeline",
    )
    parser.add_argument("--no-text-encoder", action="store_true", help="leave text encoder and tokenizer out")
    parser.add_argument("--dtype", choices=list(DTYPES.values()), help="store all weights so (default: as they are)")
    parser.add_argument(
        "--variant", choices=list(VARIANTS), action="append", default=[], help="add the weights in half precision too"
    )
    parser.add_argument(
        "--template",
        metavar="DIR",
        help="card and other files that are not the model's (default: hub_configs/NAME of a checkout, NAME as in ID)",
    )
    parser.add_argument("--output", metavar="DIR", help="keep the assembled folder here")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of --output once it is complete")


def run(args: argparse.Namespace) -> None:
    """Carry out what `add_arguments` parsed; raises `ValueError`."""
    model = locate(args.model)
    if not isinstance(model, Path):
        raise PublishError(f"there is no folder {args.model}")
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise PublishError(f"--repo-id: {one_line(error)}") from error
    if not args.dry_run:
        _require_login()  # before the hours that a large model takes
    with _output_folder(args.output, model) as output:
        missing = assemble(
            model,
            output,
            args.repo_id,
            template=args.template or TEMPLATES / args.repo_id.split("/")[-1],
            base_pipeline=args.base_pipeline,
            text_encoder=not args.no_text_encoder,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            variants=args.variant,
            overwrite=args.overwrite,
        )
        for example in missing:
            picture = model / example["output"]["url"]
            print(f"no picture for the card: {picture}", file=sys.stderr)
            if (model / "text_encoder").exists():
                command = ["localdit", "generate", example["text"]]
                for option, argument in PIPELINE_ARGUMENTS.items():
                    if (value := example.get("parameters", {}).get(argument)) is not None:
                        command += [f"--{option.replace('_', '-')}", str(value)]
                command += ["--model", str(model), "--output", str(picture)]
                print(f"to have it, make it and publish again: {shlex.join(command)}", file=sys.stderr)
        files = [path for path in sorted(output.rglob("*")) if path.is_file()]
        for path in files:
            print(f"{path.stat().st_size:>16,}  {path.relative_to(output).as_posix()}")
        print(f"{sum(path.stat().st_size for path in files):>16,}  in {len(files)} files")
        verify(output)
        print("verified: the package and the repository's own code give the same latents")
        if args.dry_run:
            print(f"dry run: nothing was uploaded to {args.repo_id}")
        else:
            print(upload(output, args.repo_id, args.private, args.revision))


def _require_login() -> None:
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, or no connection
        raise PublishError(f"no login at the Hub ({one_line(error)}); log in with `hf auth login`") from error


@contextmanager
def _output_folder(output: str | None, model: Path) -> Iterator[Path]:
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="localdit-publish-") as scratch:
        yield Path(scratch, model.name)
