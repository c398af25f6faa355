import functools
import http.server
import io
import json
import shutil
import threading

import datasets
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from diffusers_localdit.training.shards import DataError, write_shard
from diffusers_localdit.training.sources import BrokenSample, DatasetsSource, normalize_caption, open_source


def picture(number, kind="png"):
    """Of 10 + number x 20 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (20, 10 + number), (number, 0, 0)).save(file, kind)
    return file.getvalue()


def encoded(number):
    latents = np.full((4, 8, 10 + number), number, dtype=np.float16)
    return safetensors.numpy.save({"latents": latents, "prompt_embeds": np.zeros((3, 6), dtype=np.float16)})


def everything(source):
    samples = [source.read(index) for index in range(len(source))]
    return [(sample.name, sample.picture, sample.caption, sample.encoded) for sample in samples]


def shard_members(number, caption="txt"):
    content = (
        json.dumps({"caption": f"caption {number}"}).encode() if caption == "json" else f"caption {number}".encode()
    )
    return f"{number:04}", {"png": picture(number), caption: content}


def write_folder(folder, names=("b.png", "a.JPG", "sub/c.webp", "sub/a.png")):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        path.with_suffix(".txt").write_text(f"caption of {name}\n", encoding="utf-8")


def test_folder_of_pictures(tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_folder(tmp_path)
    (tmp_path / "._a.jpg").write_bytes(b"left by another system")
    (tmp_path / "note.md").touch()
    (tmp_path / "sub").rename(elsewhere / "sub")
    (tmp_path / "sub").symlink_to(elsewhere / "sub")
    source = open_source(tmp_path)
    assert everything(source) == [
        (name, picture(number), f"caption of {name}\n", None)
        for name, number in (("a.JPG", 1), ("b.png", 0), ("sub/a.png", 3), ("sub/c.webp", 2))
    ]
    assert [source.size(index) for index in range(4)] == [(11, 20), (10, 20), (13, 20), (12, 20)]


def test_imagefolder(tmp_path):
    write_folder(tmp_path)
    rows = [
        {"file_name": "b.png", "text": "first"},
        {"file_name": "sub/c.webp", "text": "a line\u2028separator"},
        {"text": "no name"},
        {"file_name": "a.JPG"},
        {"file_name": "gone.png", "text": "x"},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n{broken\n"
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    source = open_source(str(tmp_path))
    assert len(source) == 6
    assert source.read(0).caption == "first" and source.read(0).picture == picture(0)
    assert source.read(1).caption == "a line\u2028separator" and source.size(1) == (12, 20)
    reasons = ["metadata.jsonl row 3: has no file_name", "a.JPG: has no caption", "gone.png: cannot be read"]
    for index, reason in enumerate([*reasons, "metadata.jsonl row 6: is no JSON"], start=2):
        with pytest.raises(BrokenSample, match=reason):
            source.read(index)


def test_imagefolder_with_names_that_are_no_utf8(tmp_path):
    (tmp_path / "\udcff.png").write_bytes(picture(0))
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff.png", "text": "a caption"}\n')
    assert open_source(tmp_path).read(0).picture == picture(0)


@pytest.mark.parametrize("caption", ["txt", "cap", "json"])
@pytest.mark.parametrize("root", ["", "/*.tar", "/s-{0..1}.tar"])
def test_shards(tmp_path, caption, root):
    for number in (1, 0):
        members = [shard_members(number * 2 + place, caption) for place in (0, 1)]
        write_shard(tmp_path / f"s-{number}.tar", members)
    (tmp_path / "s-2.tar.tmp").write_bytes(b"half")
    source = open_source(f"{tmp_path}{root}")
    assert everything(source) == [
        (f"s-{number // 2}.tar/{number:04}", picture(number), f"caption {number}", None) for number in range(4)
    ]
    assert [source.size(index) for index in range(4)] == [(10, 20), (11, 20), (12, 20), (13, 20)]
    assert not source.precomputed


def test_precomputed_shards(tmp_path):
    samples = [(f"{number:04}", {"safetensors": encoded(number), "txt": b"a caption"}) for number in range(3)]
    samples += [("0003", {"safetensors": b"broken"}), ("0004", {"txt": b""})]
    write_shard(tmp_path / "shard-000000.tar", samples)
    source = open_source(tmp_path)
    assert source.precomputed
    assert source.read(2).encoded == encoded(2) and source.read(2).name == "shard-000000.tar/0002"
    assert source.size(2) == (8, 12)
    with pytest.raises(BrokenSample, match="0003: holds no latents"):
        source.size(3)
    with pytest.raises(BrokenSample, match="0004: has no member safetensors"):
        source.read(4)


def test_shards_of_a_server_are_fetched_once(tmp_path):
    (tmp_path / "www").mkdir()
    for number in range(2):
        write_shard(tmp_path / "www" / f"{number:02}.tar", [shard_members(number)])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/{{00..01}}.tar"
    first = open_source(root, tmp_path / "cache")
    (tmp_path / "www" / "00.tar").rename(tmp_path / "www" / "one")
    one = open_source(f"http://127.0.0.1:{server.server_port}/one", tmp_path / "cache")
    assert [sample[1] for sample in everything(one)] == [picture(0)]
    server.shutdown()
    server.server_close()
    again = open_source(root, tmp_path / "cache")
    assert [sample[1:3] for sample in everything(again)] == [(picture(n), f"caption {n}") for n in range(2)]
    assert first.fingerprint() == again.fingerprint()


def test_datasets(tmp_path):
    (tmp_path / "file.png").write_bytes(picture(1))
    rows = {
        "number": [0, 1, 2, 3, 4],
        "image": [
            {"bytes": picture(0), "path": None},
            {"bytes": None, "path": str(tmp_path / "file.png")},
            None,
            {"bytes": b"", "path": None},
            {"bytes": None, "path": str(tmp_path / "gone.png")},
        ],
        "text": ["first", "second", "third", "fourth", "fifth"],
    }
    features = datasets.Features(
        {"number": datasets.Value("int64"), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    source = DatasetsSource(datasets.Dataset.from_dict(rows, features=features), "me/shapes")
    assert len(source) == 5
    assert [source.read(index).picture for index in (0, 1)] == [picture(0), picture(1)]
    assert [source.read(index).caption for index in (0, 1)] == ["first", "second"]
    assert [source.size(index) for index in (0, 1)] == [(10, 20), (11, 20)]
    for read in (source.read, source.size):
        for row, reason in ((2, "has no picture"), (3, "has no picture"), (4, "cannot be read .No such file")):
            with pytest.raises(BrokenSample, match=f"me/shapes row {row}: {reason}"):
                read(row)
    whole = source.fingerprint()
    for part in (["number"], ["number", "text"], ["image"]):
        columns = datasets.Dataset.from_dict(
            {name: rows[name] for name in part}, datasets.Features({name: features[name] for name in part})
        )
        message = f"me/part has the columns {', '.join(part)}; expected one of images and one named text"
        with pytest.raises(DataError, match=message):
            DatasetsSource(columns, "me/part")
    assert DatasetsSource(datasets.Dataset.from_dict(rows, features).select([0]), "me/shapes").fingerprint() != whole


def test_name_that_is_nothing_here_is_taken_for_a_data_set(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        raise ConnectionError("no network\nand so on")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"no data set of that name can be loaded: no network$"):
        open_source("me/shapes")
    assert asked == [("me/shapes", "train")]
    for path in ("./shapes", "/nowhere", "a/longer/path"):
        with pytest.raises(DataError, match=f"{path} does not exist"):
            open_source(path)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"a.png": picture(0)}, "has no caption"),
        ({"a.png": picture(0), "a.txt": b" \n"}, "has an empty caption"),
        ({"a.png": picture(0), "a.txt": "é".encode("latin-1")}, "has a caption that is not UTF-8"),
    ],
)
def test_broken_captions(tmp_path, content, reason):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    write_folder(tmp_path, ["b.png"])
    source = open_source(tmp_path)
    with pytest.raises(BrokenSample, match=rf"^a\.png: {reason}"):
        source.read(0)
    assert source.read(1).caption == "caption of b.png\n"


def test_broken_samples_in_shards(tmp_path):
    samples = [
        ("0", {"png": picture(0), "txt": b"good"}),
        ("1", {"txt": b"no picture"}),
        ("2", {"png": picture(0)}),
        ("3", {"png": picture(0), "json": b"{"}),
        ("4", {"png": picture(0), "json": b'{"label": 1}'}),
        ("5", {"png": picture(0), "json": b'{"text": ["a", "b"]}'}),
        ("6", {"png": picture(0), "json": b'["text", "caption"]'}),
        ("7", {"png": b"no picture", "txt": b"caption"}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    source = open_source(tmp_path / "a.tar")
    reasons = ["has no member jpg", "has no member txt", "no JSON", "has no caption", "no text but a list"]
    reasons += ["has no caption"]
    for index, reason in enumerate(reasons, start=1):
        with pytest.raises(BrokenSample, match=rf"^a\.tar/{index}: .*{reason}"):
            source.read(index)
    with pytest.raises(BrokenSample, match=r"a\.tar/7: is no picture"):
        source.size(7)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BrokenSample, match=r"a\.tar sample 0: cannot be read"):
        source.read(0)


@pytest.mark.parametrize(
    "files, root, message",
    [
        ([], "none", "none does not exist"),
        ([], "", "holds no pictures .* and no .tar shards"),
        (["a.png", "b.png"], "", "holds 2 pictures and no captions; expected the caption of a.png in a.txt, or all"),
        (["a.txt"], "", "holds no pictures"),
        (["a.txt"], "a.txt", "a.txt is no folder and no .tar shard"),
        (["metadata.jsonl"], "", "metadata.jsonl is empty"),
        ([], "s-{0..1}.tar", "s-0.tar matches no file"),
        (["a.tar"], "", "a.tar cannot be read as an uncompressed tar archive"),
    ],
)
def test_what_is_no_data_set_is_told(tmp_path, files, root, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / root)


def test_shard_without_samples(tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match=r"a\.tar holds no samples"):
        open_source(tmp_path)


def test_fingerprints_tell_data_sets_apart_and_not_places(tmp_path):
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_shard(tmp_path / "c.tar", [shard_members(0)])
    first = open_source(tmp_path / "a").fingerprint()
    assert open_source(tmp_path / "b").fingerprint() == first
    write_folder(tmp_path / "b", ["new.png"])
    assert open_source(tmp_path / "b").fingerprint() != first
    listed = []
    for text in ("a caption", "another"):
        (tmp_path / "a" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.JPG", "text": text}))
        listed.append(open_source(tmp_path / "a").fingerprint())
    assert len({first, *listed}) == 3
    one = open_source(tmp_path / "c.tar").fingerprint()
    write_shard(tmp_path / "c.tar", [shard_members(0), shard_members(1)])
    assert open_source(tmp_path / "c.tar").fingerprint() != one


def test_captions_as_the_original_took_them():
    assert normalize_caption("  A Red\tCircle \n") == "a red\tcircle"


def test_what_is_precomputed_by_half_is_refused(tmp_path):
    """Training on a part of the data would go unnoticed."""
    (tmp_path / "precompute.json").write_text(json.dumps({"samples": 5, "samples_per_shard": 2}))
    message = "is not precomputed to the end: {} of 3 shards are there; run the same `localdit precompute` again"
    for number in range(3):
        with pytest.raises(DataError, match=message.format(number)):
            open_source(str(tmp_path))
        indices = range(2 * number, min(2 * number + 2, 5))
        samples = [(f"{index:08}", {"safetensors": encoded(index)}) for index in indices]
        write_shard(tmp_path / f"shard-{number:06}.tar", samples)
    assert len(open_source(str(tmp_path))) == 5
