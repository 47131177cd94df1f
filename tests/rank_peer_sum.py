"""A rank that sums through its peers' memory and through NCCL, launched and captured: started by torchrun."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from inference.peer_sum import PeerSum
from inference.tensor_parallel import TensorParallel

WIDTH = 5120


def main() -> None:
    """Compare the two for sizes that fit the buffer, and see that others are refused."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    ranks = TensorParallel.of(dist.new_group(list(range(dist.get_world_size()))))
    assert PeerSum.open(ranks, 64, torch.float16, device) is None
    peers = PeerSum.open(ranks, 1024 * WIDTH, torch.bfloat16, device)
    assert peers is not None, "NCCL is as fast here"
    assert not peers.takes(1025 * WIDTH, torch.bfloat16)
    assert not peers.takes(WIDTH, torch.float32)
    assert not peers.takes(WIDTH + 1, torch.bfloat16)
    generator = torch.Generator(device).manual_seed(rank)
    for num_rows in (1, 3, 64, 1000, 1024):
        mine = torch.randn(
            num_rows, WIDTH, generator=generator, device=device, dtype=torch.bfloat16
        )
        expected = mine.clone()
        dist.all_reduce(expected, group=ranks.group)
        assert torch.equal(peers.of(mine), expected), num_rows
        room = peers.room(num_rows, WIDTH, torch.bfloat16)
        assert room is not None
        for _ in range(3):  # captured, replayed: the product of a layer, written in place
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                room.copy_(mine)
                found = peers.of(room)
            graph.replay()
            assert torch.equal(found, expected), num_rows
    print("the same bits", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
