"""Attention kernels fit the shared memory of cards that have less than an H100, and use what there is."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: kernels are not tested here")

from inference.kernels.fused_attention import (
    DECODE_OPTIONS,
    TILE_OPTIONS,
    TILE_OPTIONS_ONE_BUFFER,
    TILE_OPTIONS_SHORT,
    decode_options,
    tile_options,
)
from inference.kernels.shared_memory import shared_bytes
from tests.processes import json_lines


def test_what_is_compiled_for_a_card_fits_it(tmp_path):
    lines = json_lines("tests.compiled_attention", triton_cache=tmp_path)
    assert len(lines) == 5
    for *case, found in lines:
        assert found <= shared_bytes(case[1]), case


@pytest.mark.parametrize(
    ("element_size", "h_pad", "arch", "expected"),
    [
        (2, 128, 90, TILE_OPTIONS),
        (2, 128, 89, TILE_OPTIONS),
        (2, 128, 75, TILE_OPTIONS_ONE_BUFFER),
        (2, 256, 90, TILE_OPTIONS_ONE_BUFFER),
        (2, 256, 89, TILE_OPTIONS_SHORT),
        (1, 128, 89, TILE_OPTIONS_ONE_BUFFER),
        (4, 128, 90, TILE_OPTIONS_ONE_BUFFER),
        (4, 128, 89, TILE_OPTIONS_SHORT),
    ],
)
def test_tiles_are_as_large_as_the_card_allows(element_size, h_pad, arch, expected):
    assert tile_options(element_size, h_pad, 64, arch) == expected


def test_two_buffers_of_keys_are_kept_where_they_fit():
    assert decode_options(2, 128, 16, 75) == DECODE_OPTIONS
    assert decode_options(4, 256, 16, 90) == DECODE_OPTIONS
    assert decode_options(4, 256, 16, 89)["STAGES"] == 2
