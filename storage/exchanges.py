"""A request and its reply take bounded time, in whatever pieces they come.

A socket's own timeout sees silence alone, so a reply that trickles passes it for ever. Here a reply
is cut off unless it is there in time: all of it, or its head where its body is streamed (see
`storage.stalls` for that). It is then asked for again, as after any other fault.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPSConnection
from botocore.exceptions import HTTPClientError
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from storage.stalls import PIECE_BYTES, paced

_AT_WORK = 10
"""How many times longer a store may take that copies or joins objects before it answers: while it
does, it sends blanks so that no connection is given up."""


class _Line:
    """What one exchange goes over: its sockets, under descriptors of their own.

    So it can be cut in whatever state it is, in the middle of a TLS handshake too.
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def hold(self, sock: Any) -> None:
        """Take part in a connection."""
        with self._lock:
            self._sockets.append(socket.fromfd(sock.fileno(), socket.AF_INET, socket.SOCK_STREAM))

    def shutdown(self) -> None:
        """End whatever this exchange waits for."""
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError):  # the other side has hung up
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connections; they stay as they are."""
        with self._lock:
            for sock in self._sockets:
                sock.close()
            self._sockets = []


class _OfThisThread(threading.local):
    line: _Line | None = None


_now = _OfThisThread()


class _Known:
    """A connection that the exchange which uses it can cut."""

    sock: Any

    def request(self, *args: Any, **kwargs: Any) -> Any:
        if _now.line is not None and self.sock is not None:
            _now.line.hold(self.sock)
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _new_conn(self) -> Any:
        sock = super()._new_conn()  # type: ignore[misc]
        if _now.line is not None:
            _now.line.hold(sock)
        return sock


class _Connection(_Known, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _SecureConnection(_Known, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def bound_exchanges(client: Any, bound_s: float) -> None:
    """Let no exchange of a boto3 client last longer than `bound_s`, and as much for every 2 MiB sent.

    One that does raises botocore's HTTPClientError.
    """
    session = client._endpoint.http_session
    session._pool_classes_by_scheme.update(http=_Pool, https=_SecurePool)
    session.send = partial(_send, session.send, bound_s)


def _send(send: Callable[[Any], Any], bound_s: float, request: Any) -> Any:
    allowed_s = bound_s * _num_bounds(request)
    fault = f"no whole reply within {allowed_s:g} s to {request.method} {request.url.split('?')[0]}"
    with closing(_Line()) as line, paced(line, allowed_s) as pace:
        _now.line = line
        try:
            with pace:
                reply = send(request)
                if reply.status_code >= 300:
                    reply.content  # noqa: B018 (reads it: an error is not streamed)
        except Exception as error:
            if pace.is_cut:
                raise HTTPClientError(error=fault) from error
            raise
        finally:
            _now.line = None
    if pace.is_cut:
        reply.raw.close()
        raise HTTPClientError(error=fault)
    return reply


def _num_bounds(request: Any) -> int:
    if request.method == "POST" or "x-amz-copy-source" in request.headers:
        return _AT_WORK
    return 1 + int(request.headers.get("Content-Length", 0)) // PIECE_BYTES
