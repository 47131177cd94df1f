"""Replies that come a byte at a time, from a real server on loopback."""

import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from storage.errors import NotFound, StoreUnavailable
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy, make_client
from storage.s3_store import S3Store
from storage.stage_sources import open_s3

QUICK = RetryPolicy(max_attempts=100, base_s=0.01, cap_s=0.1, stall_s=0.5, patience_s=3.0)
DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
LISTING = b"""<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated><Contents>
<Key>m/config.json</Key><Size>2</Size><ETag>"e"</ETag><LastModified>2026-01-01T00:00:00Z</LastModified>
</Contents></ListBucketResult>"""
COPIED = b"<CopyObjectResult><ETag>e</ETag></CopyObjectResult>"
MISSING = b"<Error><Code>NoSuchKey</Code></Error>"


class SlowServer(ThreadingTCPServer):
    """A store of one object, `m/config.json`, some of whose replies trickle without an end."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_slow = 0
        """How many more exchanges trickle."""

        self.trickles = "head"
        """What of a reply trickles: "head", "body" or "continue", the line before the body is sent."""

        self.slow_s = 1e9
        """How long a part goes on trickling, before what is left of it comes at once."""

        self.num_asked = 0
        self.num_slow_handshakes = 0
        self.tls: ssl.SSLContext | None = None

    @property
    def config(self) -> StorageConfig:
        scheme = "https" if self.tls else "http"
        url = f"{scheme}://127.0.0.1:{self.server_address[1]}"
        return StorageConfig(endpoint_url=url, region="us-east-1")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Those who hang up are what the tests are about."""


class _Handler(StreamRequestHandler):
    server: SlowServer

    def setup(self) -> None:
        if self.server.num_slow_handshakes:
            self.server.num_slow_handshakes -= 1
            self._send_slowly(self.request.sendall, b"\x16\x03\x03\x00\xff" + bytes(255))
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        while head := self._read_head():
            self.server.num_asked += 1
            is_slow = self.server.num_slow > 0
            self.server.num_slow -= is_slow
            if b"100-continue" in head:
                self._send(b"HTTP/1.1 100 Continue\r\n", is_slow, "continue")
                self.wfile.write(b"\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            self.rfile.read(int(length[1]) if length else 0)
            reply_head, body = self._reply(head)
            self._send(reply_head, is_slow, "head")
            self._send(body, is_slow, "body")

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def _read_head(self) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return b""
            head += line
        return head

    def _reply(self, head: bytes) -> tuple[bytes, bytes]:
        method, target, _ = head.split(b" ", 2)
        status, body = b"200 OK", b""
        if b"/none" in target:
            status, body = b"404 Not Found", MISSING
        elif b"list-type=2" in target:
            body = LISTING
        elif method == b"GET":
            body = b"{}"
        elif method == b"PUT" and b"x-amz-copy-source" in head.lower():
            body = COPIED
        length = 2 if method == b"HEAD" else len(body)
        return (
            b'HTTP/1.1 %b\r\nDate: %b\r\nLast-Modified: %b\r\nETag: "e"\r\nContent-Length: %d\r\n\r\n'
            % (status, DATE.encode(), DATE.encode(), length)
        ), body

    def _send(self, data: bytes, is_slow: bool, part: str) -> None:
        if not is_slow or part != self.server.trickles:
            self.wfile.write(data)
            return
        self._send_slowly(self.wfile.write, data)

    def _send_slowly(self, write: Callable[[bytes], object], data: bytes) -> None:
        fast_at = time.monotonic() + self.server.slow_s
        for place in range(len(data)):
            write(data[place : place + 1])
            if time.monotonic() < fast_at:
                time.sleep(0.2)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowServer]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with SlowServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def store_on(server: SlowServer) -> S3Store:
    client = make_client(server.config, read_timeout_s=QUICK.stall_s)
    return S3Store("s3://bucket/m", server.config, client=client, retry=QUICK)


REQUESTS: dict[str, Callable[[S3Store], object]] = {
    "LIST": lambda store: list(store.list()),
    "HEAD": lambda store: store.head("config.json"),
    "GET": lambda store: store.get("config.json"),
    "PUT if absent": lambda store: store.put_if_absent("new", b"x"),
    "DELETE": lambda store: store.delete("old"),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_reply_whose_head_trickles_is_cut_off_and_asked_for_again(
    server: SlowServer, request_: str
) -> None:
    server.num_slow = 2
    began = time.monotonic()
    REQUESTS[request_](store_on(server))
    assert server.num_asked == 3
    assert time.monotonic() - began < 5


def test_a_listing_that_trickles_is_cut_off_and_asked_for_again_by_the_store_and_by_staging(
    server: SlowServer,
) -> None:
    server.trickles = "body"
    server.num_slow = 2
    assert [info.key for info in store_on(server).list()] == ["config.json"]
    server.num_slow = 2
    source = open_s3("s3://bucket/m/", server.config, QUICK)
    assert [file.name for file in source.list_files()] == ["config.json"]
    assert server.num_asked == 6


def test_a_refusal_that_trickles_is_cut_off_and_asked_for_again(server: SlowServer) -> None:
    server.trickles = "body"
    server.num_slow = 2
    with pytest.raises(NotFound):
        store_on(server).get("none")
    assert server.num_asked == 3


def test_a_leave_to_send_the_body_that_trickles_is_cut_off(server: SlowServer) -> None:
    server.trickles = "continue"
    server.num_slow = 2
    store_on(server).put("new", b"x")
    assert server.num_asked == 3


def test_a_store_whose_every_reply_trickles_is_given_up_in_bounded_time_with_the_seconds(
    server: SlowServer,
) -> None:
    server.num_slow = 1000
    began = time.monotonic()
    with pytest.raises(
        StoreUnavailable, match=r"no whole reply within 0\.5 s to GET .*is the store up"
    ):
        list(store_on(server).list())
    assert time.monotonic() - began < 8


def test_a_copy_may_take_longer_since_the_store_works_before_it_answers(server: SlowServer) -> None:
    server.trickles = "body"
    server.num_slow = 1
    server.slow_s = 1.5
    store_on(server).copy("config.json", "copy.json", size=2)
    assert server.num_asked == 2


def test_over_tls_too_a_head_and_a_handshake_that_trickle_are_cut_off(
    server: SlowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tls = self_signed(tmp_path / "store.pem")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "store.pem"))
    server.num_slow = 2
    store = store_on(server)
    assert [info.key for info in store.list()] == ["config.json"]
    assert server.num_asked == 3
    server.num_slow_handshakes = 2
    assert [info.key for info in store_on(server).list()] == ["config.json"]
    assert server.num_slow_handshakes == 0


def self_signed(path: Path) -> ssl.SSLContext:
    """Write key and certificate of 127.0.0.1 into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context
