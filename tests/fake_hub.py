"""A model hub on loopback: the few requests huggingface_hub makes, counted, and refused on demand."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """One repository, `org/model`, at one commit; its files are those of a dataset of that name too."""

    files: dict[str, bytes]
    refusals: int = 0
    """How many more requests are answered 429."""

    retry_after: str = "0"
    requests: list[str] = field(default_factory=list)
    spoiled: dict[str, bytes] = field(default_factory=dict)
    """What is served instead of a file, under the digests of the right one."""

    xet_store: str = ""
    """Where hf-xet finds the files: a URL of its own, see `store_in_xet`; "" where they come by plain HTTP."""

    xet_hashes: dict[str, str] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    """Files of which half is sent, and no more."""

    _is_over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def store_in_xet(self, folder: Path) -> None:
        """Keep large files in a real Xet store below a folder, from which hf-xet gets them by itself."""
        import hf_xet

        self.xet_store = f"local://{folder}"
        with hf_xet.XetSession().new_upload_commit(endpoint=self.xet_store) as commit:
            sent = {
                name: commit.start_upload_bytes(data)
                for name, data in self.files.items()
                if is_large(name)
            }
        self.xet_hashes = {name: one.result().xet_info.hash for name, one in sent.items()}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def count(self, part: str) -> int:
        return sum(part in line for line in self.requests)

    def take_refusal(self, line: str) -> bool:
        with self._lock:
            if "org/" not in line:  # the client library's own curiosity
                return False
            self.requests.append(line)
            self.refusals -= 1
            return self.refusals >= 0

    def wait(self) -> None:
        """Until this hub is closed."""
        self._is_over.wait()

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def is_large(name: str) -> bool:
    """Whether the hub keeps the file in LFS, under its SHA-256, or in Git, under its blob's SHA-1."""
    return name.endswith((".safetensors", ".parquet"))


def digest(name: str, data: bytes) -> str:
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.take_refusal(f"{self.command} {path}"):
            self._answer(429, b"slow down", {"Retry-After": hub.retry_after})
        elif path.startswith("/api/models/org/model/revision/"):
            self._answer(200, json.dumps(self._info()).encode(), {"X-Repo-Commit": COMMIT})
        elif path.removeprefix("/datasets").startswith(f"/org/model/resolve/{COMMIT}/"):
            self._send_file(path.split(COMMIT + "/", 1)[1])
        elif path == "/xet-token":
            token = {
                "Access-Token": "t",
                "Token-Expiration": "4102444800",
                "Cas-Url": hub.xet_store,
            }
            self._answer(200, b"", {f"X-Xet-{name}": value for name, value in token.items()})
        else:
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> dict[str, object]:
        siblings = []
        for name, data in self.hub.files.items():
            item: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if is_large(name):
                item["lfs"] = {"sha256": digest(name, data), "size": len(data), "pointerSize": 134}
            else:
                item["blobId"] = digest(name, data)
            siblings.append(item)
        return {"id": "org/model", "sha": COMMIT, "siblings": siblings}

    def _send_file(self, name: str) -> None:
        if name not in self.hub.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = self.hub.spoiled.get(name, self.hub.files[name])
        headers = {"ETag": f'"{digest(name, self.hub.files[name])}"', "X-Repo-Commit": COMMIT}
        if name in self.hub.xet_hashes:
            headers["X-Xet-Hash"] = self.hub.xet_hashes[name]
            headers["X-Xet-Refresh-Route"] = f"{self.hub.endpoint}/xet-token"
        start, _, last = (self.headers.get("Range") or "bytes=0-")[6:].partition("-")
        begin, end = int(start), int(last) + 1 if last else len(data)
        is_part = begin > 0 or end < len(data)
        if is_part:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        if name in self.hub.stalled and self.command == "GET":
            headers["Connection"] = "close"
            self._answer(200, data, headers, stop_at=len(data) // 2)
            self.hub.wait()
            return
        self._answer(206 if is_part else 200, data[begin:end], headers)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], *, stop_at: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop_at])
            self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass
