"""Which model is this? A digest that costs at most 4 MiB of reading per weight file.

SHA-256 over, in order of file name, with each part's length before it:

- name and bytes of every small file (.json, .jinja, .txt, .model) at the top of the folder, but for
  hidden ones and the MANIFEST.json of a staged copy;
- name, size, header bytes, and 64 blocks of 64 KiB spread evenly over the tensors' bytes (all of them
  when there are no more) of every weight file.

Equal models give equal ids wherever they lie, and whether they were read whole or in these places only.
A weight file changed only between the sampled blocks keeps its id: this names a model, it does not
prove that each byte arrived.
"""

import hashlib
import math
import struct
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

BLOCK_BYTES = 64 * 1024
NUM_BLOCKS = 64
# Files besides the weights that can change a token.
_SMALL_FILE_SUFFIXES = (".json", ".jinja", ".txt", ".model")
# Written by whoever staged the model: when and from where, which changes no token.
_STAGING_RECORD = "MANIFEST.json"


class WeightSample(NamedTuple):
    """What of a weight file goes into the id."""

    name: str
    num_bytes: int
    header: bytes
    blocks: list[bytes]


class Span(NamedTuple):
    """Bytes [start, end) of a file."""

    start: int
    end: int


def counts(name: str) -> bool:
    """Whether a small file of that name, at the top of the folder, goes into the id; hidden ones do not."""
    is_ours = name == _STAGING_RECORD or name.startswith(".")
    return PurePath(name).suffix in _SMALL_FILE_SUFFIXES and not is_ours


def sample_spans(num_bytes: int, num_header_bytes: int) -> list[Span]:
    """Return which parts of a weight file go into the id, besides its header."""
    begin = 8 + num_header_bytes
    num_data_bytes = num_bytes - begin
    num_blocks = math.ceil(num_data_bytes / BLOCK_BYTES)
    if num_blocks <= NUM_BLOCKS:
        offsets = [i * BLOCK_BYTES for i in range(num_blocks)]
    else:
        last = num_data_bytes - BLOCK_BYTES
        offsets = [i * last // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
    return [Span(begin + i, min(begin + i + BLOCK_BYTES, num_bytes)) for i in offsets]


def content_id(small_files: Iterable[tuple[str, bytes]], samples: Iterable[WeightSample]) -> str:
    """Return 64 hex digits; small files and samples each in the order of their names."""
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)

    for name, data in small_files:
        add(name.encode("utf-8", "surrogateescape"))
        add(data)
    for sample in samples:
        add(sample.name.encode("utf-8", "surrogateescape"))
        add(str(sample.num_bytes).encode())
        add(sample.header)
        for block in sample.blocks:
            add(block)
    return digest.hexdigest()
