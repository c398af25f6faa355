import functools
import http.server
import io
import os
import tarfile
import threading

import pytest
import webdataset

from diffusers_localdit.checkpoint_io import CheckpointError
from diffusers_localdit.training.shards import DataError, TarIndex, expand, fetch, write_shard

SAMPLES = [
    ("0001", {"jpg": b"first", "txt": b"one"}),
    ("folder.with.dots/0002", {"jpg": b"second", "txt": b"two"}),
    ("0003", {"jpg": os.urandom(3000), "txt": "drei äöü".encode()}),
    ("x" * 150, {"jpg": b"", "txt": b"a name longer than a header"}),
]


def contents(shard):
    samples = []
    for index in range(len(shard)):
        with shard.open(index) as (key, members):
            samples.append((key, {extension: file.read() for extension, file in members.items()}))
    return samples


def seen_by_webdataset(path):
    samples = webdataset.WebDataset(str(path), shardshuffle=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


def test_what_webdataset_writes_is_read(tmp_path):
    samples = [sample for sample in SAMPLES if len(sample[0]) < 100]  # its names end there
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    assert contents(TarIndex(tmp_path / "a.tar")) == samples == seen_by_webdataset(tmp_path / "a.tar")


def test_what_is_written_is_read_by_webdataset_and_here(tmp_path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    assert contents(TarIndex(tmp_path / "a.tar")) == SAMPLES == seen_by_webdataset(tmp_path / "a.tar")


FOREIGN = ["__meta__/a.txt", "./b/é.JPG", "./b/é.seg.png", "no_extension", "c.txt", "./b/é.txt"]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_archives_are_read_as_webdataset_reads_them(tmp_path, tar_format):
    """Folders, parts of names and upper-case extensions; a key that returns later is another sample."""
    write_foreign(tmp_path / "a.tar", FOREIGN, tar_format)
    found = contents(TarIndex(tmp_path / "a.tar"))
    assert [key for key, _ in found] == ["./b/é", "c", "./b/é"]
    assert [sorted(members) for _, members in found] == [["jpg", "seg.png"], ["txt"], ["txt"]]
    assert found == seen_by_webdataset(tmp_path / "a.tar")


def test_files_that_macos_adds_are_passed_over(tmp_path):
    """WebDataset makes a sample `b/` of them."""
    write_foreign(tmp_path / "a.tar", ["b/x.jpg", "b/._x.jpg", "b/x.txt"], tarfile.PAX_FORMAT)
    assert [(key, sorted(members)) for key, members in contents(TarIndex(tmp_path / "a.tar"))] == [
        ("b/x", ["jpg", "txt"])
    ]


def write_foreign(path, names, tar_format):
    with tarfile.open(path, "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(b"x" * len(name)))


def test_shard_is_whole_or_not_there_and_depends_on_its_samples_alone(tmp_path):
    def stops_early():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", stops_early())
    assert not (tmp_path / "a.tar").exists()
    write_shard(tmp_path / "a.tar", SAMPLES)
    write_shard(tmp_path / "b.tar", SAMPLES)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.tar"]
    with pytest.raises(ValueError, match=r"'a\.b' cannot be the key"):
        write_shard(tmp_path / "c.tar", [("a.b", {"txt": b""})])


@pytest.mark.parametrize("kept", [100, 512, 1400, 5000])
def test_cut_off_shard_is_refused(tmp_path, kept):
    write_shard(tmp_path / "a.tar", SAMPLES)
    os.truncate(tmp_path / "a.tar", kept)
    with pytest.raises(DataError, match=r"a\.tar (is damaged or cut off|cannot be read)"):
        TarIndex(tmp_path / "a.tar")


def test_damaged_header_in_the_middle_is_refused(tmp_path):
    write_shard(tmp_path / "a.tar", SAMPLES)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[2048 + 148] ^= 1  # the check sum of the third member
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="damaged or cut off at byte 2048"):
        TarIndex(tmp_path / "a.tar")


def test_compressed_and_missing_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    for name in ("a.tar", "b.tar"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an uncompressed tar"):
            TarIndex(tmp_path / name)


def test_braces_and_wildcards(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "c{x}.tar", "d[1].tar"):
        (tmp_path / name).touch()
    assert expand("http://host/a-{08..11}.tar?x=1") == [f"http://host/a-{n}.tar?x=1" for n in ("08", "09", "10", "11")]
    assert expand("https://host/{train,val}-{0..1}.tar") == [
        f"https://host/{part}-{n}.tar" for part in ("train", "val") for n in (0, 1)
    ]
    assert expand(f"{tmp_path}/b-*.tar") == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]
    assert expand(f"{tmp_path}/b-{{1,*}}.tar") == [f"{tmp_path}/b-1.tar", f"{tmp_path}/b-0.tar"]
    assert expand(f"{tmp_path}/c{{x}}.tar") == [f"{tmp_path}/c{{x}}.tar"]
    assert expand(f"{tmp_path}/d[{{1..1}}].tar") == [f"{tmp_path}/d[1].tar"]  # which matches d1.tar otherwise
    (tmp_path / "e" / "f").mkdir(parents=True)
    (tmp_path / "e" / "f" / "b-2.tar").touch()
    assert expand(f"{tmp_path}/**/b-*.tar") == [f"{tmp_path}/{name}" for name in ("b-0.tar", "b-1.tar", "e/f/b-2.tar")]
    with pytest.raises(DataError, match=r"b-2\.tar matches no file"):
        expand(f"{tmp_path}/b-{{0..2}}.tar")


@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = []

        def do_GET(self):
            self.requests.append(self.path)
            if self.path == "/short.tar":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"x" * 100)
            elif self.path == "/chunks.tar":
                self.protocol_version = "HTTP/1.1"
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"3e8\r\n" + b"x" * 100)
                self.close_connection = True
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    (tmp_path / "www").mkdir()
    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", tmp_path / "www", Handler.requests
    served.shutdown()
    served.server_close()


def test_fetching_downloads_once_and_whole(tmp_path, server):
    address, www, requests = server
    write_shard(www / "a.tar", SAMPLES)
    (www / "b").mkdir()
    write_shard(www / "b" / "a.tar", SAMPLES[:1])
    for _ in range(2):
        paths = [fetch(f"{address}/{name}", tmp_path / "cache") for name in ("a.tar", "b/a.tar")]
    assert [contents(TarIndex(path)) for path in paths] == [SAMPLES, SAMPLES[:1]]
    assert requests == ["/a.tar", "/b/a.tar"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("short.tar", "ended after 100 of 1000 bytes"),
        ("chunks.tar", "IncompleteRead"),
        ("none.tar", "404"),
        ("a b.tar", "URL can't contain control characters"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, server, name, reason):
    with pytest.raises(DataError, match=f"cannot fetch http.*{name}.*{reason}"):
        fetch(f"{server[0]}/{name}", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("**/*"))


def test_samples_that_fail_leave_no_part_of_a_shard(tmp_path):
    with pytest.raises(ValueError, match=r"'a\.b' cannot be the key of a sample"):
        write_shard(tmp_path / "a.tar", [*SAMPLES, ("a.b", {"txt": b""})])
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, server):
    write_shard(server[1] / "a.tar", SAMPLES)
    (tmp_path / "cache").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*cache"):
        fetch(f"{server[0]}/a.tar", tmp_path / "cache")
