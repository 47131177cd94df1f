"""A loopback HTTP/1.1 proxy that misbehaves on demand, so that a test can name the exact request.

with FaultProxy(upstream_port) as proxy:
    proxy.add("drop_after", match="^PUT .*commits/", count=1)

status       answer with `status` and an S3 error `code`; the upstream never sees the request
drop_before  close the connection; the upstream never sees the request
drop_after   let the upstream do it, then close: the reply is lost
flip         one bit of the reply's body is wrong
truncate     `kept` of the body, half by default, then close
stall        half of the body, then silence for `seconds`, then close
trickle      half of the body, then a byte every tenth of a second for `seconds`, then close
unless       take If-None-Match out and sign anew: a store that ignores the condition
"""

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.seaweed import ACCESS_KEY, SECRET_KEY

Kind = Literal[
    "status", "drop_before", "drop_after", "flip", "truncate", "stall", "trickle", "unless"
]
_LIMIT = 1 << 20
_CHANCES: tuple[Kind, ...] = (
    *("status", "status", "status", "drop_before", "drop_after", "drop_after", "drop_after"),
    *("flip", "truncate", "stall"),
)
_STATUSES = (
    (503, "SlowDown"),
    (500, "InternalError"),
    (409, "ConditionalRequestConflict"),
)
FOREVER = 1 << 60


@dataclass
class Rule:
    kind: Kind
    match: str
    """Regular expression over the request line, such as `^GET .*part-00001`."""

    count: int = 1
    """How many more requests it hits."""

    status: int = 503
    code: str = "SlowDown"
    seconds: float = 5.0
    kept: float = 0.5
    once_each: bool = False
    """Hit each request line only the first time it comes."""

    seen: set[str] = field(default_factory=set)


class Dice:
    """A random fault for one request in so many, without end: `FaultProxy(port, dice=Dice(0.05, 7))`."""

    def __init__(self, share: float, seed: int, *, stall_s: float = 2.0) -> None:
        self.share = share
        self._stall_s = stall_s
        self._random = random.Random(seed)

    def __call__(self, line: str) -> Rule | None:
        """Return the fault for this request line, most often none."""
        if self._random.random() >= self.share:
            return None
        kind: Kind = self._random.choice(_CHANCES)
        if kind == "flip" and (not line.startswith("GET") or "?" in line):
            kind = (
                "truncate"  # only an object's own bytes have a checksum; TLS is there for the rest
            )
        status, code = self._random.choice(_STATUSES)
        return Rule(kind, "", status=status, code=code, seconds=self._stall_s)


@dataclass
class _Message:
    head: bytes
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class FaultProxy:
    upstream_port: int
    port: int = 0
    requests: list[str] = field(default_factory=list)
    """Request lines, as they came."""

    keeps_lines: bool = True
    """False where they would become too many."""

    num_requests: int = 0
    dice: Callable[[str], Rule | None] | None = None
    """Asked for a fault when no rule has one."""

    bytes_per_s: float = 0.0
    """Most bytes of replies a second, all connections together; 0: as fast as it goes."""

    injected: Counter[str] = field(default_factory=Counter)
    """Faults that took effect so far, by kind: a flip needs a body."""

    _free_at: float = 0.0
    _rules: list[Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, kind: Kind, match: str, **more: object) -> Rule:
        rule = Rule(kind, match, **more)  # type: ignore[arg-type]
        with self._lock:
            self._rules.append(rule)
        return rule

    def pending(self) -> int:
        """Number of rules that will still hit something."""
        with self._lock:
            return sum(rule.count > 0 for rule in self._rules)

    def count(self, match: str) -> int:
        """Number of requests so far whose line matches."""
        return sum(bool(re.search(match, line)) for line in list(self.requests))

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        ready = threading.Event()

        async def listen() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_LIMIT)
            self.port = server.sockets[0].getsockname()[1]
            self._server = server
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(listen())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for writer in list(self._writers):
            with suppress(ConnectionError):
                await writer.wait_closed()
        await asyncio.sleep(0.01)  # those closed a moment ago are let go by the loop

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()
            self._writers.discard(writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Pass one request and its reply; False when the connection is to be closed."""
        request = await _read_head(reader)
        line = request.head.split(b"\r\n", 1)[0].decode("latin-1")
        if request.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
        request.body = await _read_body(reader, request.headers)
        self.num_requests += 1
        if self.keeps_lines:
            self.requests.append(line)
        rule = self._take(line)
        kind = rule.kind if rule else None
        if rule and kind == "status":
            self.injected[f"{rule.status}"] += 1
            writer.write(_refusal(rule))
            await writer.drain()
            return True
        if kind == "drop_before":
            self.injected[kind] += 1
            return False
        if kind == "unless" and "if-none-match" in request.headers:
            request.head = _signed_anew(request)
        reply = await self._forward(request, line)
        if kind == "drop_after":
            self.injected[kind] += 1
            return False
        if kind == "unless" or (kind and reply.body):
            self.injected[kind] += 1
        if kind == "flip" and reply.body:
            middle = len(reply.body) // 2
            flipped = bytes([reply.body[middle] ^ 1])
            reply.body = reply.body[:middle] + flipped + reply.body[middle + 1 :]
        if rule and kind in ("truncate", "stall", "trickle") and reply.body:
            kept = int(len(reply.body) * rule.kept)
            writer.write(reply.head + reply.body[:kept])
            await writer.drain()
            if kind == "stall":
                await asyncio.sleep(rule.seconds)
            for place in range(kept, kept + int(10 * rule.seconds) if kind == "trickle" else kept):
                writer.write(reply.body[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
            return False
        await self._reply(writer, reply.head + reply.body)
        return True

    async def _reply(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        step = 1 << 16 if self.bytes_per_s else max(1, len(data))
        for start in range(0, len(data), step):
            if self.bytes_per_s:
                now = self._loop.time()
                self._free_at = max(self._free_at, now) + step / self.bytes_per_s
                await asyncio.sleep(self._free_at - now)
            writer.write(data[start : start + step])
            await writer.drain()

    def _take(self, line: str) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.count <= 0 or not re.search(rule.match, line):
                    continue
                if rule.once_each and line in rule.seen:
                    continue
                rule.seen.add(line)
                rule.count -= 1
                return rule
        return self.dice(line) if self.dice else None

    async def _forward(self, request: _Message, line: str) -> _Message:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.upstream_port, limit=_LIMIT
        )
        self._writers.add(writer)
        try:
            writer.write(re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", request.head) + request.body)
            await writer.drain()
            reply = await _read_head(reader)
            while reply.head.startswith(b"HTTP/1.1 100"):
                reply = await _read_head(reader)
            status = reply.head[9:12]
            if not line.startswith("HEAD") and status not in (b"204", b"304"):
                reply.body = await _read_body(reader, reply.headers)
            return reply
        finally:
            writer.close()
            self._writers.discard(writer)


def _signed_anew(request: _Message) -> bytes:
    """Return the head without If-None-Match, under a signature of its own."""
    first, *lines = request.head.decode("latin-1").rstrip("\r\n").split("\r\n")
    verb, target, _ = first.split(" ")
    signed = {}
    for line in lines:
        name, value = line.split(":", 1)
        if name.lower() not in ("authorization", "if-none-match", "x-amz-date", "expect"):
            signed[name] = value.strip()
    anew = AWSRequest(verb, f"http://{request.headers['host']}{target}", signed, request.body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(anew)
    head = "".join(f"{name}: {value}\r\n" for name, value in anew.headers.items())
    return f"{first}\r\n{head}\r\n".encode("latin-1")


def _refusal(rule: Rule) -> bytes:
    body = (
        f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>injected</Message></Error>"
    )
    head = f"HTTP/1.1 {rule.status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()


async def _read_head(reader: asyncio.StreamReader) -> _Message:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return _Message(head, {name.lower(): value.strip() for name, value in pairs})


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    """The body as it is on the wire, chunk sizes and all."""
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", "0")))
    body = b""
    while True:
        line = await reader.readline()
        size = int(line.split(b";")[0], 16)
        if size:
            body += line + await reader.readexactly(size + 2)
            continue
        # Trailers, if any, up to the empty line.
        body += line
        while line != b"\r\n":
            line = await reader.readline()
            body += line
        return body
