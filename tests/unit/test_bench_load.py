"""What measures loading moves the right bytes, and says what it is asked to without a GPU."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import bench_load
from tests.benchmarks.bare_copies import HOST_WAYS, BareFile, Way, into_memory


@pytest.mark.parametrize("way", HOST_WAYS)
def test_every_way_moves_the_bytes_of_the_file(way: Way, tmp_path: Path) -> None:
    data = os.urandom((2 << 20) + 4096)
    path = tmp_path / "weights"
    path.write_bytes(data)
    buffer = torch.zeros(1 << 20, dtype=torch.uint8)
    with BareFile(path, way) as file:
        for offset in (0, 4096, 1 << 20):
            try:
                file.fill(buffer, offset)
            except OSError as error:
                pytest.skip(str(error))
            assert buffer.numpy().tobytes() == data[offset : offset + len(buffer)]
    assert into_memory([path], way, 2, 1) > 0


def test_the_host_alone_is_measured_on_small_and_on_huge_pages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--host-only",
        "--gb",
        "0.02",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--buffers-mib",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["bench_load", *options])
    bench_load.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row[:2] for row in rows] == [
        [pages, way] for pages in ("small", "huge") for way in (*HOST_WAYS, "ours, into tensors")
    ]
    assert all(gb_per_s > 0 for *_, gb_per_s, _ in rows)
