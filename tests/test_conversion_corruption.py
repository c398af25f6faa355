"""Hostile and broken checkpoints: each gives one clear error and leaves nothing behind."""

import builtins
import functools
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator

import pytest
import safetensors.torch
import torch
from conversion_inputs import is_dead, tiny_original

from diffusers_localdit.conversion import CheckpointError, convert_checkpoint

Change = Callable[[dict[str, torch.Tensor], random.Random], object]


@functools.cache
def container(kind: str) -> bytes:
    """The sound checkpoint that the corruptions start from, as a file of this kind."""
    return pack(tiny_original("local", "branch"), kind)


def pack(content: object, kind: str) -> bytes:
    if kind == "safetensors":
        return safetensors.torch.save(content)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == "pt")
    return buffer.getvalue()


def suffix(kind: str) -> str:
    return ".safetensors" if kind == "safetensors" else ".pt"


def truncations() -> Iterator[tuple[str, str, bytes]]:
    for kind in ("safetensors", "pt", "legacy"):
        whole = container(kind)
        chosen = random.Random(0).sample(range(len(whole)), 25)
        lengths = [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 22, len(whole) - 2, len(whole) - 1, *chosen]
        # Not named by length: a legacy file has addresses in it, which are longer in one process than in another, and
        # processes that test in parallel must know the tests by the same names.
        for number, length in enumerate(lengths):
            yield f"truncated-{number}", kind, whole[:length]


def overwritten_ranges() -> Iterator[tuple[str, str, bytes]]:
    """Noise over what holds the file together: the header, the pickle, the table of contents at a zip's end."""
    for kind, start, end in (("safetensors", 0, 16), ("pt", 40, 400), ("pt", -3000, -1), ("legacy", 0, 200)):
        for seed in range(4):
            noisy = bytearray(container(kind))
            noisy[start:end] = random.Random(seed).randbytes(len(noisy[start:end]))
            yield f"noise-{start}-{seed}", kind, bytes(noisy)


def other_files() -> Iterator[tuple[str, str, bytes]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "no checkpoint")
    evil_entry = io.BytesIO()
    with zipfile.ZipFile(evil_entry, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(functools.partial(os.mkdir, "ran"), protocol=2))
        file.writestr("archive/version", "3")
    for kind in ("safetensors", "pt"):
        yield "zip", kind, archive.getvalue()
        yield "noise", kind, random.Random(0).randbytes(5000)
        yield "text", kind, b"<html><body>404 Not Found</body></html>"
        yield "zeros", kind, bytes(4096)
        yield "lfs-pointer", kind, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "zip-with-pickle", "pt", evil_entry.getvalue()
    yield "safetensors-named-pt", "pt", container("safetensors")
    yield "pt-named-safetensors", "safetensors", container("pt")
    yield "huge-header", "safetensors", (2**62).to_bytes(8, "little") + container("safetensors")[8:]
    yield "header-no-json", "safetensors", (8).to_bytes(8, "little") + b"{{{{{{{{"


def safetensors_headers() -> Iterator[tuple[str, str, bytes]]:
    """Headers that are JSON but lie."""
    whole = container("safetensors")
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if not is_dead(name) and name != "__metadata__"]
    lies = {
        "shape": lambda entry: entry.update(shape=[size + 1 for size in entry["shape"]]),
        "dtype": lambda entry: entry.update(dtype="F64"),
        "unknown-dtype": lambda entry: entry.update(dtype="F7"),
        "beyond-the-end": lambda entry: entry.update(
            data_offsets=[offset + 10**9 for offset in entry["data_offsets"]]
        ),
        "backwards": lambda entry: entry.update(data_offsets=entry["data_offsets"][::-1]),
        "negative": lambda entry: entry.update(shape=[-size for size in entry["shape"]]),
        "no-offsets": lambda entry: entry.pop("data_offsets"),
    }
    for number, (lie, tell) in enumerate(lies.items()):
        for seed in range(2):
            told = json.loads(json.dumps(header))
            tell(told[random.Random(10 * number + seed).choice(names)])
            text = json.dumps(told).encode()
            yield f"header-{lie}-{seed}", "safetensors", len(text).to_bytes(8, "little") + text + data


def live_name(tensors: dict[str, torch.Tensor], rng: random.Random) -> str:
    return rng.choice(sorted(name for name in tensors if not is_dead(name)))


def lose_a_key(tensors, rng):
    del tensors[live_name(tensors, rng)]


def lose_a_block(tensors, rng):
    for name in [name for name in tensors if name.startswith("transformer_blocks.0.")]:
        del tensors[name]


def add_a_key(tensors, rng):
    tensors[f"{live_name(tensors, rng)}.{rng.choice(['weight', 'scale', 'lora_A'])}"] = torch.zeros(2)


def rename_a_key(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name.replace(".", "_", 1) + "_"] = tensors.pop(name)


def grow(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def shrink(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name] = tensors[name][:-1].clone()


def add_a_dimension(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name] = tensors[name][None]


def flatten(tensors, rng):
    name = rng.choice(sorted(name for name in tensors if tensors[name].ndim > 1))
    tensors[name] = tensors[name].flatten()


def swap_two(tensors, rng):
    first = live_name(tensors, rng)
    second = rng.choice(
        [name for name in tensors if not is_dead(name) and tensors[name].shape != tensors[first].shape]
    )
    tensors[first], tensors[second] = tensors[second], tensors[first]


def empty(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name] = torch.zeros(0)


def poison(tensors, rng):
    tensor = tensors[live_name(tensors, rng)].flatten()
    tensor[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])


def quantise(tensors, rng):
    name = live_name(tensors, rng)
    tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn]))


TENSOR_CHANGES: dict[Change, int] = {
    lose_a_key: 20,
    lose_a_block: 1,
    add_a_key: 10,
    rename_a_key: 10,
    grow: 15,
    shrink: 10,
    add_a_dimension: 10,
    flatten: 10,
    swap_two: 10,
    empty: 5,
    poison: 20,
    quantise: 8,
}


def changed_tensors() -> Iterator[tuple[str, str, bytes]]:
    for change, count in TENSOR_CHANGES.items():
        for seed in range(count):
            tensors = tiny_original("local", "branch")
            change(tensors, random.Random(seed))
            kind = ("pt", "safetensors")[seed % 2]
            yield f"{change.__name__}-{seed}", kind, pack(tensors, kind)


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def odd_contents() -> Iterator[tuple[str, str, bytes]]:
    tensors = tiny_original("local", "branch")
    circular: dict = {}
    circular["state_dict"] = circular
    stretched = {**tensors, "proj_out.bias": torch.zeros(1).expand(16)}
    contents = {
        "tensor": torch.zeros(3),
        "list": list(tensors.values()),
        "number": 3,
        "nothing": {},
        "empty-wrapper": {"state_dict": {}},
        "wrapper-of-a-list": {"state_dict": list(tensors.values())},
        "circular": circular,
        "deep": functools.reduce(lambda inner, _: {"model": inner}, range(200), {"x": 1}),
        "numbers-as-keys": dict(enumerate(tensors.values())),
        "list-inside": {**tensors, "proj_out.bias": [0.0] * 16},
        "dictionary-inside": {**tensors, "proj_out.bias": {"weight": tensors["proj_out.bias"]}},
        "sparse": {**tensors, "proj_out.weight": tensors["proj_out.weight"].to_sparse()},
        "meta": {**tensors, "proj_out.bias": torch.zeros(16, device="meta")},
        "more-numbers-than-stored": stretched,
        "two-names-one-memory": {
            **tensors,
            "adaln_single.emb.timestep_embedder.linear_1.bias": tensors["pos_embed.proj.bias"],
        },
        "a-million-blocks": {**tensors, "transformer_blocks.999999.scale_shift_table": torch.zeros(6, 12)},
        "endless-block-number": {**tensors, f"transformer_blocks.{'9' * 5000}.scale_shift_table": torch.zeros(6, 12)},
        "same-name-twice": {**tensors, "module.proj_out.bias": torch.zeros(16)},
        "line-breaks-in-a-name": {**tensors, "one\ntwo\r\nthree\u2028\x1b[2J\udc80": torch.zeros(2)},
        "calls-mkdir": {**tensors, "x": Call(os.mkdir, "ran")},
        "calls-eval": {**tensors, "x": Call(builtins.eval, "__import__('os').mkdir('ran')")},
        "calls-import": {**tensors, "x": Call(builtins.__import__, "os")},
        "class": {**tensors, "x": Call(functools.partial, os.mkdir, "ran")},
    }
    for name, content in contents.items():
        yield name, "pt", pack(content, "pt")
        if name.startswith("calls"):
            yield f"{name}-legacy", "legacy", pack(content, "legacy")


CORRUPTIONS = [
    pytest.param(kind, data, id=f"{name}-{kind}")
    for source in (truncations, overwritten_ranges, other_files, safetensors_headers, changed_tensors, odd_contents)
    for name, kind, data in source()
]


def test_there_are_at_least_200_corruptions():
    assert len(CORRUPTIONS) >= 200


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy"])
def test_the_file_that_they_start_from_is_sound(kind, tmp_path):
    path = tmp_path / f"a{suffix(kind)}"
    path.write_bytes(container(kind))
    convert_checkpoint(path, tmp_path / "out")


@pytest.mark.parametrize(("kind", "data"), CORRUPTIONS)
def test_one_error_and_no_output(kind, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a pickle that runs would leave its mark
    path = tmp_path / f"a{suffix(kind)}"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(path, tmp_path / "new" / "out")
    message = str(error.value)
    assert message.isprintable() and 20 < len(message) < 500, message
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "legacy"])
def test_any_flipped_bit_converts_or_is_an_error(kind, tmp_path):
    """A flip among the numbers is just another number; anywhere else it may surface as no other kind of error."""
    rng, whole = random.Random(0), container(kind)
    path, output = tmp_path / f"a{suffix(kind)}", tmp_path / "out"
    refused = 0
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[rng.choice([rng.randrange(len(whole)), rng.randrange(3000), -rng.randrange(1, 3000)])] ^= (
            1 << rng.randrange(8)
        )
        path.write_bytes(flipped)
        try:
            convert_checkpoint(path, output, overwrite=True)
        except CheckpointError:
            refused += 1
        assert {entry.name for entry in tmp_path.iterdir()} <= {path.name, "out"}
    assert refused > 0


@pytest.mark.parametrize("name", ["", "missing.pt", "folder.pt", "a.bin", "a"])
def test_what_is_no_checkpoint_file(name, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for other in ("a.bin", "a"):
        (tmp_path / other).write_bytes(container("pt"))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"does not exist|is a folder|expected \.safetensors, \.pt"):
        convert_checkpoint(tmp_path / name, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
