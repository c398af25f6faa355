"""
A Hub on this machine: what huggingface_hub asks of the real one, answered on 127.0.0.1 out of memory.

Like the real one it has two origins, so that a client that hands its token on to the storage is found out. It can be
told to fail, see `LoopbackHub.fail`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_loopbackTokenThatMayWrite"
READ_TOKEN = "hf_loopbackTokenThatMayRead"
LFS_SUFFIXES = (".safetensors", ".pt", ".png", ".model")


class File(NamedTuple):
    """A file of a commit. Its content is in `LoopbackHub.contents`, or in the xet store that the client writes to."""

    sha256: str
    size: int
    oid: str  # what git calls it
    is_lfs: bool

    def entry(self, path: str, xet_hashes: Mapping[str, str]) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.is_lfs else {}
        xet = {"xetHash": xet_hashes[self.sha256]} if self.is_lfs and self.sha256 in xet_hashes else {}
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid} | lfs | xet


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        oid = (self.branches | self.tags).get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        identity = f"{branch} {title} {len(self.commits)} {sorted(files.items())}"
        commit = Commit(hashlib.sha1(identity.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit.oid
        return commit


class LoopbackHub:
    """
    Repositories by id (with `datasets/` or `spaces/` before those that are no models), and what clients did.

    `requests` has a line like `GET /api/whoami-v2` for each; `downloads` the file and the asked range of bytes of each
    transfer; `uploads` the digest of each upload that arrived whole.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self})) for _ in "ab"
        ]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        self.emptied()

    def emptied(self, xet_store: Path | None = None) -> "LoopbackHub":
        """The same servers, with nothing on them and no memory of what was."""
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.xet_store = xet_store
        self.xet_hashes: dict[str, str] = {}  # by sha256, of what lies in the store
        self.requests: list[str] = []
        self.downloads: list[tuple[str, str | None]] = []
        self.uploads: list[str] = []
        self.failures: list[list] = []
        return self

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, repository: str, source: Path | Mapping[str, bytes], private: bool = False) -> str:
        """Commits a folder or files as all that is in a repository, and returns the commit."""
        if isinstance(source, Path):
            source = {
                path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()
            }
        found = self.repositories.setdefault(repository, Repository(private))
        return found.commit("main", "Add", {name: self.store(name, data) for name, data in source.items()}).oid

    def store(self, path: str, content: bytes, is_lfs: bool | None = None) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.contents[sha256] = content
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(sha256, len(content), oid, path.endswith(LFS_SUFFIXES) if is_lfs is None else is_lfs)

    def expect_through_xet(self, folder: Path) -> None:
        """The real Hub reads from the store which file an upload is; this one has to know the files beforehand."""
        import hf_xet

        paths = [path for path in folder.rglob("*") if path.name.endswith(LFS_SUFFIXES)]
        for path, info in zip(paths, hf_xet.hash_files([str(path) for path in paths])):
            self.xet_hashes[hashlib.sha256(path.read_bytes()).hexdigest()] = info.hash

    def read(self, repository: str, path: str, revision: str = "main") -> bytes:
        return self.contents[self.repositories[repository].find(revision).files[path].sha256]

    def fail(self, request: str, answer: int | str | Callable[[], None], times: int = 1) -> None:
        """
        Lets the next `times` requests that match a regular expression (like `"PUT /objects/"`) fail: `answer` is a
        status, "cut" for a connection that breaks in the middle of the content, or what to do there before it breaks.
        """
        self.failures.append([request, answer, times])

    def failure_of(self, request: str) -> int | str | Callable[[], None] | None:
        with self.lock:
            for failure in self.failures:
                if failure[2] > 0 and re.match(failure[0], request):
                    failure[2] -= 1
                    return failure[1]
        return None

    def environment(self, home: Path, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """Of a client whose caches and login lie in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({} if token is None else {"HF_TOKEN": token}),
            **({} if xet else {"HF_HUB_DISABLE_XET": "1"}),
        }


REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+)"
PREFIX = r"(?P<prefix>datasets/|spaces/|)"
API = rf"/api/(?P<kind>models|datasets|spaces)/{REPOSITORY}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = {
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate_card",
    rf"GET {API}(/revision/{REVISION})?": "info",
    rf"GET {API}/tree/{REVISION}(/(?P<path>.+))?": "tree",
    rf"POST {API}/paths-info/{REVISION}": "paths_info",
    rf"GET {API}/refs": "refs",
    rf"GET {API}/commits/{REVISION}": "commits",
    rf"POST {API}/preupload/{REVISION}": "preupload",
    rf"POST {API}/commit/{REVISION}": "commit",
    rf"POST {API}/branch/(?P<name>[^/]+)": "branch",
    rf"POST {API}/tag/{REVISION}": "tag",
    rf"GET {API}/xet-(?P<access>read|write)-token/{REVISION}": "xet_token",
    rf"POST /{PREFIX}{REPOSITORY}\.git/info/lfs/objects/batch": "lfs_batch",
    r"POST /objects/verify": "lfs_verify",
    r"PUT /objects/(?P<sha256>\w{64})": "lfs_upload",
    r"(GET|HEAD) /objects/(?P<sha256>\w{64})/(?P<path>.+)": "lfs_download",
    rf"(GET|HEAD) /{PREFIX}{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)": "resolve",
}


class Refusal(Exception):
    """An answer that ends the request: status, `X-Error-Code`, message."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {url.path}"
        self.query = parse_qs(url.query)
        self.cut = False
        with self.hub.lock:
            self.hub.requests.append(request)
        failure = self.hub.failure_of(request)
        if failure == "cut" or callable(failure):
            self.cut = True
            if self.command in ("PUT", "POST"):
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                if callable(failure):
                    failure()
                self.break_connection()
                return
        self.body = self.read_body()
        try:
            if isinstance(failure, int):
                raise Refusal(failure, None, "told to fail")
            for pattern, name in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    with self.hub.lock:
                        answer = getattr(self, name)(**groups)
                    answer()
                    return
            raise Refusal(404, None, f"no such route: {request}")
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            if code == "EntryNotFound":
                headers["X-Repo-Commit"] = self.commit_oid
            self.answer(status, json.dumps({"error": message}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # What all routes need

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def break_connection(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if self.cut else content)
        if self.cut:
            self.wfile.flush()
            self.break_connection()

    def json(self, content, headers: Mapping[str, str] | None = None):
        return lambda: self.answer(
            200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def log_message(self, *_):
        pass

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def require_login(self, may_write: bool = False) -> None:
        if self.token not in (TOKEN, READ_TOKEN):
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if may_write and self.token != TOKEN:
            raise Refusal(403, None, "this token may not write")

    def find(self, repository: str, kind: str = "models", revision: str = "main") -> tuple[Repository, Commit]:
        key = repository if kind in ("models", "") else f"{kind.rstrip('/')}/{repository}"
        found = self.hub.repositories.get(key)
        if found is None or (found.private and self.token not in (TOKEN, READ_TOKEN)):
            raise Refusal(401 if self.token is None else 404, "RepoNotFound", f"there is no repository {key}")
        commit = found.find(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"there is no revision {revision}")
        self.commit_oid = commit.oid
        return found, commit

    # Accounts and repositories

    def whoami(self):
        self.require_login()
        return self.json({"type": "user", "name": "owner", "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        self.require_login(may_write=True)
        asked = json.loads(self.body)
        prefix = {"dataset": "datasets/", "space": "spaces/"}.get(asked.get("type"), "")
        key = f"{prefix}{asked['organization'] or 'owner'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{key}"}
        if key in self.hub.repositories:
            return lambda: self.answer(409, json.dumps(url).encode(), {})
        self.hub.repositories[key] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[key].commit(
            "main", "initial commit", {".gitattributes": self.hub.store(".gitattributes", b"")}
        )
        return self.json(url)

    def validate_card(self):
        content = json.loads(self.body)["content"]
        errors = [] if re.match(r"---\n.*\n---\n", content, re.DOTALL) else [{"message": "no metadata"}]
        reply = json.dumps({"errors": errors, "warnings": []}).encode()
        return lambda: self.answer(400 if errors else 200, reply, {})

    def info(self, kind: str, repository: str, revision: str):
        found, commit = self.find(repository, kind, revision)
        siblings = [{"rfilename": path, "size": file.size} for path, file in sorted(commit.files.items())]
        return self.json({"id": repository, "sha": commit.oid, "private": found.private, "siblings": siblings})

    def tree(self, kind: str, repository: str, revision: str, path: str):
        """In pages of a hundred; without `recursive` the folders are not listed, which nobody here asks for."""
        _, commit = self.find(repository, kind, revision)
        paths = sorted(name for name in commit.files if name.startswith(f"{path}/" if path else ""))
        start = int(self.query.get("cursor", ["0"])[0])
        entries = [commit.files[name].entry(name, self.hub.xet_hashes) for name in paths[start : start + 100]]
        more = {} if start + 100 >= len(paths) else {"Link": f'<{self.page(start + 100)}>; rel="next"'}
        return self.json(entries, more)

    def page(self, cursor: int) -> str:
        query = "&".join(f"{key}={value}" for key, values in self.query.items() for value in values if key != "cursor")
        return f"{self.hub.endpoint}{urlsplit(self.path).path}?{query}&cursor={cursor}"

    def paths_info(self, kind: str, repository: str, revision: str):
        _, commit = self.find(repository, kind, revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        return self.json(
            [commit.files[path].entry(path, self.hub.xet_hashes) for path in asked if path in commit.files]
        )

    def refs(self, kind: str, repository: str):
        found, _ = self.find(repository, kind)

        def listed(refs: dict[str, str], folder: str) -> list[dict]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        return self.json(
            {"branches": listed(found.branches, "heads"), "tags": listed(found.tags, "tags"), "converts": []}
        )

    def commits(self, kind: str, repository: str, revision: str):
        found, _ = self.find(repository, kind, revision)
        return self.json(
            [
                {"id": oid, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for oid, title, _ in reversed(found.commits)
            ]
        )

    def branch(self, kind: str, repository: str, name: str):
        self.require_login(may_write=True)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found, commit = self.find(repository, kind, start)
        if name in found.branches:
            raise Refusal(409, None, f"the branch {name} exists")
        found.branches[name] = commit.oid
        return self.json({})

    def tag(self, kind: str, repository: str, revision: str):
        self.require_login(may_write=True)
        found, commit = self.find(repository, kind, revision)
        found.tags[json.loads(self.body)["tag"]] = commit.oid
        return self.json({})

    # Uploading

    def preupload(self, kind: str, repository: str, revision: str):
        self.require_login(may_write=True)
        _, commit = self.find(repository, kind, revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            present = commit.files.get(path)
            known = {} if present is None else {"oid": present.sha256 if present.is_lfs else present.oid}
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return self.json({"files": answers})

    def lfs_batch(self, prefix: str, repository: str):
        self.require_login(may_write=True)
        self.find(repository, prefix)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/objects/{asked['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/objects/verify"}}
            stored = asked["oid"] in self.hub.contents
            objects.append({"oid": asked["oid"], "size": asked["size"]} | ({} if stored else {"actions": actions}))
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha256: str):
        if self.token is not None:
            raise Refusal(400, None, "the storage got a token")
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Refusal(400, None, "the content has another digest")
        self.hub.contents[sha256] = self.body
        self.hub.uploads.append(sha256)
        return self.json({})

    def lfs_verify(self):
        asked = json.loads(self.body)
        if len(self.hub.contents.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, None, f"{asked['oid']} did not arrive")
        return self.json({})

    def xet_token(self, kind: str, repository: str, access: str, revision: str):
        self.find(repository, kind, revision)
        if access == "write":
            self.require_login(may_write=True)
        reply = {"casUrl": f"local://{self.hub.xet_store}", "accessToken": "xet", "exp": 2**31}
        headers = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        return self.json(reply, dict(zip(headers, map(str, reply.values()))))

    def commit(self, kind: str, repository: str, revision: str):
        self.require_login(may_write=True)
        found, head = self.find(repository, kind, revision)
        if revision not in found.branches:
            raise Refusal(400, None, f"{revision} is no branch")
        files, title = dict(head.files), ""
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refusal(412, None, f"{revision} has another head")
            elif key == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = self.hub.store(value["path"], content, is_lfs=False)
            elif key == "lfsFile":
                sha256 = value["oid"]
                if sha256 not in self.hub.contents and sha256 not in self.hub.xet_hashes:
                    raise Refusal(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = File(sha256, value["size"], hashlib.sha1(sha256.encode()).hexdigest(), True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        oid = found.commit(revision, title, files).oid
        return self.json({"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repository}/commit/{oid}"})

    # Downloading

    def resolve(self, prefix: str, repository: str, revision: str, path: str):
        _, commit = self.find(repository, prefix, revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", f"there is no file {path}")
        file = commit.files[path]
        if not file.is_lfs:
            return self.content(file, path, {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit.oid})
        headers = {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            "X-Repo-Commit": commit.oid,
            "Location": f"{self.hub.storage}/objects/{file.sha256}/{quote(path)}",
        }
        if file.sha256 in self.hub.xet_hashes:
            token = f"{self.hub.endpoint}/api/{prefix or 'models/'}{repository}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.hub.xet_hashes[file.sha256], "Link": f'<{token}>; rel="xet-auth"'}
        return lambda: self.answer(302, b"", headers)

    def lfs_download(self, sha256: str, path: str):
        if self.token is not None:
            raise Refusal(400, None, "the storage got a token")
        if sha256 not in self.hub.contents:
            raise Refusal(404, None, f"{path} is in the xet store only")
        return self.content(File(sha256, 0, "", True), path, {"ETag": f'"{sha256}"'})

    def content(self, file: File, path: str, headers: dict[str, str]):
        content = self.hub.contents[file.sha256]
        asked = self.headers.get("Range")
        if self.command == "GET":
            self.hub.downloads.append((path, asked))
        if asked is None:
            return lambda: self.answer(200, content, headers)
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
        end = min(int(end or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return lambda: self.answer(206, content[int(start) : end + 1], headers)
