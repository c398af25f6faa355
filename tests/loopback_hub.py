"""A server on this machine that serves one folder as a repository of the Hub, as far as downloading needs it."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


@contextmanager
def loopback_hub(repository: str, folder: Path) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Yields the endpoint's address, and a list that grows by (file, asked range of bytes) with every download."""
    downloads = []
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, _, _ = self.path.partition("?")
            if re.fullmatch(rf"/api/models/{repository}(/revision/\w+)?", path):
                info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif re.fullmatch(rf"/api/models/{repository}/tree/\w+", path):
                files = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": COMMIT}
                    for name in names
                ]
                self.answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
            elif (match := re.fullmatch(rf"/{repository}/resolve/\w+/(.+)", path)) and match[1] in names:
                self.send_file(match[1])
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})

        do_HEAD = do_GET

        def send_file(self, name: str) -> None:
            content = (folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range")
            if self.command == "GET":
                downloads.append((name, asked))
            if asked is None:
                self.answer(200, content, headers)
                return
            start, end = (int(place) for place in re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            self.answer(206, content[start : end + 1], headers)

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        server.server_close()
