"""What a replica's process and its ranks say to each other: length-prefixed JSON over a Unix socket.

    rank -> replica   hello {rank, pid} · ready {info, waited_s} · progress {completions, stats, ...} · log · failed {code, error}
    replica -> rank 0 submit {sequences} · stop
    replica -> ranks  files · no_more                       which weight files may be read (`inference.rank_files`)

A closed socket is a message too: either side is gone. Nothing here executes what it reads.
"""

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from inference.backends.base import BackendInfo, EngineStats
from inference.sampling import SamplingParams
from inference.sequence import Completion, Sequence, TokenLogprob

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")
_MAX_BYTES = 1 << 30


def encode(message: Message) -> bytes:
    """Return one message as it goes over the socket."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take bytes as they come; yield the messages they complete.

        Raises:
            ValueError: the stream is not ours.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > _MAX_BYTES:
                raise ValueError(f"a message of {length} bytes, at most {_MAX_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield json.loads(body)


def receive(connection: socket.socket, decoder: Decoder) -> list[Message] | None:
    """Read what is there, waiting for something; None when the other side is gone."""
    try:
        data = connection.recv(1 << 20)
    except OSError:
        return None
    return list(decoder.feed(data)) if data else None


def sequence_to_json(sequence: Sequence) -> Message:
    """Plain values of a sequence."""
    return {
        "seq_id": sequence.seq_id,
        "prompt_token_ids": list(sequence.prompt_token_ids),
        "sampling": asdict(sequence.sampling),
        "draw_seed": sequence.draw_seed,
    }


def sequence_from_json(values: Message) -> Sequence:
    """The sequence of `sequence_to_json`."""
    sampling = dict(values["sampling"])
    for name in ("stop", "stop_token_ids"):
        sampling[name] = tuple(sampling[name])
    return Sequence(
        values["seq_id"],
        values["prompt_token_ids"],
        SamplingParams(**sampling),
        draw_seed=values["draw_seed"],
    )


def completion_to_json(completion: Completion) -> Message:
    """Plain values of a completion."""
    return asdict(completion)


def completion_from_json(values: Message) -> Completion:
    """The completion of `completion_to_json`."""
    logprobs = values["logprobs"]
    if logprobs is not None:
        logprobs = tuple(
            TokenLogprob(token_id, logprob, tuple((t, p) for t, p in top))
            for token_id, logprob, top in logprobs
        )
    return Completion(**{**values, "token_ids": tuple(values["token_ids"]), "logprobs": logprobs})


def info_to_json(info: BackendInfo) -> Message:
    """Plain values of a backend's description."""
    return asdict(info)


def info_from_json(values: Message) -> BackendInfo:
    """The description of `info_to_json`."""
    return BackendInfo(**values)


def stats_to_json(stats: EngineStats) -> Message:
    """Plain values of totals."""
    return asdict(stats)


def update_stats(stats: EngineStats, values: Message, before: EngineStats) -> None:
    """Set totals in place to those of `stats_to_json`, which follow on `before`."""
    for name, value in values.items():
        earlier = getattr(before, name)
        if name in ("peak_device_bytes", "kv_occupancy"):
            value = max(earlier, value)
        elif name != "extra":
            value += earlier
        setattr(stats, name, value)
