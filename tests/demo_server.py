"""The demo as a process of its own, and what it takes to talk to it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

OFFLINE = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


class Server(NamedTuple):
    address: str
    process: subprocess.Popen

    def rss(self) -> int:
        """Bytes of memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(command: list[str], folder: Path, **environment: str) -> Iterator[Server]:
    """A process that serves the demo, until it is left; its output is in `folder`."""
    log = folder / "demo.log"
    environment = {"GRADIO_TEMP_DIR": str(folder / "cache")} | environment
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | OFFLINE | environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    try:
        line = process.stdout.readline()  # what it says once it is ready; empty if it ended
        assert " is at http://" in line, log.read_text()
        yield Server(line.split(" is at ")[1].split("/ ")[0], process)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def serving_bundled_model(folder: Path, **environment: str) -> Iterator[Server]:
    options = ("--dtype", "float32", "--port", str(free_port()))
    command = [str(Path(sys.executable).with_name("localdit")), "demo", *options]
    with serving(command, folder, **environment) as server:
        yield server


def ask(address: str, api_name: str, *values) -> tuple[str, object]:
    """The last event of a call by the app's own protocol, `complete` or `error`, and its data."""
    with httpx.Client(timeout=None, trust_env=False) as client:
        call = f"{address}/gradio_api/call/{api_name}"
        event = client.post(call, json={"data": list(values)}).raise_for_status().json()["event_id"]
        name = ""
        with client.stream("GET", f"{call}/{event}") as events:
            for line in events.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: ") and name in ("complete", "error"):
                    return name, json.loads(line.removeprefix("data: "))
    raise AssertionError(f"{address} ended the answer after {name!r}")


def download(address: str, file: dict) -> bytes:
    return httpx.get(f"{address}/gradio_api/file={file['path']}", trust_env=False).raise_for_status().content
