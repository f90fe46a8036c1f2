"""The few parts of the hub's HTTP API that models need, over a dictionary of files: create, upload (plain and LFS), list, download."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "somebody"

Repositories = dict[str, dict[str, bytes]]


class Hub(ThreadingHTTPServer):
    """`repositories` holds the files of each, by name; `objects` what was uploaded by LFS, by hash."""

    daemon_threads = True

    def __init__(self, repositories: Repositories):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.objects = repositories, dict[str, bytes]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())).encode()).hexdigest()


@contextmanager
def hub(repositories: Repositories) -> Iterator[Hub]:
    """A hub that serves these while it is open, and takes more."""
    server = Hub(repositories)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run(program: str, endpoint: str, directory: Path, **environment: str) -> str:
    """What a Python program prints that sees only this hub: the address is read when huggingface_hub is imported."""
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        text=True,
        capture_output=True,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(directory / "hf_home"),
            "HF_TOKEN": "hf_of_the_stand_in",
            "HF_HUB_DISABLE_XET": "1",  # Xet has servers of its own; without it, the client uploads large files by LFS
            "PYTHONPATH": os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **environment,
        },
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body, path = self.rfile.read(int(self.headers["Content-Length"])), unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self._json({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            large = {True: "lfs", False: "regular"}  # as the hub decides: by the name
            files = [{"path": p, "uploadMode": large[p.endswith(".safetensors")]} for p in (f["path"] for f in json.loads(body)["files"])]
            self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            actions = {o["oid"]: {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}} for o in wanted}
            self._json({"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in wanted]})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            files = self.server.repositories[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            oid = self.server.commit(found[1])
            self._json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{oid}", "commitOid": oid})
        else:
            self._missing("Unknown")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/lfs/")
        self.server.objects[self.path.removeprefix("/lfs/")] = body
        self._send(200, b"")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._json({"name": USER, "type": "user", "orgs": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(/.+)?)?", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                self._missing("RepoNotFound")
            elif found[2] == "tree":
                self._json(
                    [{"type": "file", "path": p, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for p, data in files.items()]
                )
            else:
                siblings = [{"rfilename": p} for p in files]
                self._json({"id": found[1], "sha": self.server.commit(found[1]), "siblings": siblings, "tags": [], "private": False})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.server.repositories.get(found[1], {}).get(found[2])
            if found[1] not in self.server.repositories:
                self._missing("RepoNotFound")
            elif data is None:
                self._missing("EntryNotFound", self.server.commit(found[1]))
            else:
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self._send(200, data, {"ETag": etag, "X-Repo-Commit": self.server.commit(found[1])})
        else:
            self._missing("Unknown")

    do_HEAD = do_GET

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, commit: str | None = None) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, **({"X-Repo-Commit": commit} if commit else {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
