"""The JSON header of a safetensors file: which tensors it names, and how many bytes they must take."""

import json
import math
from pathlib import Path
from typing import Any

from inference.errors import ModelError

_ELEMENT_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def check_header(path: Path, header: bytes) -> tuple[tuple[str, ...], int]:
    """Return (tensor names, bytes of all tensors); tensors must lie one after the other.

    Raises:
        ModelError: they do not, or it is not a header.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = sorted(
            (*(int(offset) for offset in entry["data_offsets"]), _num_tensor_bytes(entry), name)
            for name, entry in entries.items()
        )
        position = 0
        for begin, end, num_tensor_bytes, name in spans:
            if begin != position or end - begin != num_tensor_bytes:
                raise ModelError(
                    f"{path}: tensor {name} lies at {begin} to {end}, expected {position} to "
                    f"{position + num_tensor_bytes}: not a whole safetensors file; fetch it again"
                )
            position = end
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: unreadable safetensors header; fetch it again") from error
    return tuple(entries), position


def _num_tensor_bytes(entry: dict[str, Any]) -> int:
    num_elements = math.prod(int(size) for size in entry["shape"])
    return math.ceil(num_elements * _ELEMENT_BITS[entry["dtype"]] / 8)
