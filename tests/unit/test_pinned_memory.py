"""Memory that copies to the device are made from: whole pages, had at once, kept for the next."""

import mmap

import pytest
import torch

from inference import pinned_memory as module
from inference.pinned_memory import give_back, make_ready, take_pinned

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def device_in_use() -> None:
    """As it is when weights are loaded: without one nothing counts as pinned."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


@pytest.mark.parametrize("num_pages", [1, 3, 1024])
def test_touched_memory_is_whole_pages_that_begin_where_a_huge_one_may(num_pages: int) -> None:
    num_bytes = num_pages * mmap.PAGESIZE
    memory = module._touched(num_bytes)
    assert (memory.nbytes, memory.data_ptr() % (2 << 20)) == (num_bytes, 0)
    assert not memory.any()
    memory.fill_(7)
    assert bytes(memory.numpy().data) == b"\x07" * num_bytes


@gpu
@needs_cuda
def test_what_is_given_back_is_handed_out_again() -> None:
    taken = [take_pinned(2 * mmap.PAGESIZE) for _ in range(3)]
    assert all(memory.is_pinned() for memory in taken)
    addresses = {memory.data_ptr() for memory in taken}
    while taken:
        give_back(taken.pop())
    assert {take_pinned(2 * mmap.PAGESIZE).data_ptr() for _ in range(3)} == addresses
    assert take_pinned(4 * mmap.PAGESIZE).nbytes == 4 * mmap.PAGESIZE


@gpu
@needs_cuda
def test_memory_that_cannot_be_registered_is_taken_from_torch_and_nothing_else_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered = take_pinned(8 * mmap.PAGESIZE)
    monkeypatch.setattr(module, "_touched", lambda num_bytes: registered)  # a second time: refused
    memory = take_pinned(8 * mmap.PAGESIZE)
    assert memory.is_pinned()
    assert memory.data_ptr() != registered.data_ptr()
    assert torch.arange(10, device="cuda").sum().item() == 45
    memory.fill_(9)
    copied = torch.empty_like(memory, device="cuda").copy_(memory, non_blocking=True)
    assert (copied == 9).all()


@gpu
@needs_cuda
def test_what_is_made_ready_is_what_is_taken_and_no_more_is_made() -> None:
    num_bytes = 16 * mmap.PAGESIZE
    before = len(module._registered)
    make_ready(6, num_bytes, torch.device("cuda", 0), num_threads=3)
    make_ready(6, num_bytes, torch.device("cuda", 0), num_threads=3)  # the same six
    taken = [take_pinned(num_bytes) for _ in range(6)]
    assert len({memory.data_ptr() for memory in taken}) == 6
    assert len(module._registered) == before + 6
    seventh = take_pinned(num_bytes)
    assert seventh.data_ptr() not in {memory.data_ptr() for memory in taken}
    for memory in [*taken, seventh]:
        give_back(memory)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_takes_memory_that_could_not_be_made_ready_meets_the_error_instead_of_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(num_bytes: int) -> torch.Tensor:
        raise MemoryError(f"{num_bytes} bytes")

    monkeypatch.setattr(module, "_touched", no_memory)
    make_ready(4, 32 * mmap.PAGESIZE, torch.device("cuda", 0), num_threads=2)
    with pytest.raises(MemoryError, match=str(32 * mmap.PAGESIZE)):
        take_pinned(32 * mmap.PAGESIZE)
