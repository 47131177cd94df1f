import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.sampling import SamplingParams
from storage.errors import CorruptObject
from storage.manifest import Shard
from tasks.feed_batches import Counter, from_counts, key_digest, to_counts
from tasks.job import ShardConfig
from tasks.plan_count import NUM_EXAMPLES, ShardCutter
from tasks.plan_table import shards_from_bytes, shards_to_bytes
from tasks.prepare import Row


def row(index, num_tokens, state=None, key=None):
    ids = [1] * num_tokens if state is None else []
    return Row(
        index=index,
        values={},
        key=index if key is None else key,
        state=state,
        error=state and f"row {index}",
        token_ids=ids,
        num_tokens=num_tokens,
    )


def counts(rows, *, has_id=False):
    return from_counts(to_counts(rows, Counter(), has_id=has_id, run=SamplingParams()))


def cut(tokens, *, batch=1000, **config):
    cutter = ShardCutter(ShardConfig(**config))
    rows = [row(index, count) for index, count in enumerate(tokens)]
    for first in range(0, len(rows), batch):
        cutter.add(counts(rows[first : first + batch]), 0)
    return cutter.finish([])


def test_shards_hold_about_the_target_and_never_more():
    found = cut([40, 40, 40, 10, 90, 100, 1], target_tokens=100)
    assert [shard.num_prompt_tokens for shard in found.shards] == [80, 50, 90, 100, 1]


def test_a_row_above_the_target_is_a_shard_of_its_own():
    found = cut([5, 500, 5], target_tokens=100)
    assert [shard.num_rows for shard in found.shards] == [1, 1, 1]


def test_bad_rows_count_no_tokens_but_keep_their_place():
    cutter = ShardCutter(ShardConfig(max_rows=2))
    bad = row(1, 988, "overlong")
    cutter.add(counts([row(0, 5), bad, row(2, 7), row(3, 0, "invalid_input")]), 0)
    found = cutter.finish([])
    assert [
        (s.row_start, s.row_end, s.num_prompt_tokens, s.num_bad_rows) for s in found.shards
    ] == [
        (0, 2, 5, 1),
        (2, 4, 7, 1),
    ]
    assert found.bad_rows == {"invalid_input": 1, "overlong": 1}
    assert found.examples[0] == {"row_index": 1, "state": "overlong", "error": "row 1"}


def test_only_the_first_examples_are_kept():
    cutter = ShardCutter(ShardConfig())
    cutter.add(counts([row(index, 0, "invalid_input") for index in range(50)]), 0)
    cutter.add_errors(50, "unreadable")
    found = cutter.finish([])
    assert len(found.examples) == NUM_EXAMPLES
    assert found.bad_rows == {"invalid_input": 100}


@given(
    tokens=st.lists(st.integers(1, 50), max_size=60),
    target=st.integers(1, 200),
    max_rows=st.integers(1, 20),
    batch=st.integers(1, 60),
)
def test_shards_are_contiguous_bounded_and_the_same_whatever_the_batches(
    tokens, target, max_rows, batch
):
    found = cut(tokens, batch=batch, target_tokens=target, max_rows=max_rows)
    assert found.shards == cut(tokens, target_tokens=target, max_rows=max_rows).shards
    position = 0
    for shard_id, shard in enumerate(found.shards):
        assert (shard.shard_id, shard.row_start) == (shard_id, position)
        assert 1 <= shard.num_rows <= max_rows
        assert shard.num_prompt_tokens <= target or shard.num_rows == 1
        assert shard.num_prompt_tokens == sum(tokens[shard.row_start : shard.row_end])
        position = shard.row_end
    assert position == len(tokens) == found.num_rows


@given(before=st.lists(st.integers(1, 9), max_size=9), lost=st.lists(st.integers(1, 9), max_size=9))
def test_a_damaged_files_rows_are_taken_out_without_a_trace(before, lost):
    def added(cutter, tokens):
        rows = [row(cutter.num_rows + i, n, key=f"k{i}") for i, n in enumerate(tokens)]
        cutter.add(counts(rows, has_id=True), 1)

    straight, bumpy = ShardCutter(ShardConfig(max_rows=3)), ShardCutter(ShardConfig(max_rows=3))
    for cutter in (straight, bumpy):
        added(cutter, before)
    mark = bumpy.mark()
    added(bumpy, lost)
    bumpy.reset(mark)
    for cutter in (straight, bumpy):
        cutter.add_errors(len(lost), "unreadable")
    assert list(bumpy.digests["digest"]) == list(straight.digests["digest"])
    assert dataclasses.asdict(bumpy.finish([])) == dataclasses.asdict(straight.finish([]))


def test_the_histogram_counts_runnable_rows_by_powers_of_two():
    stats = cut([1, 2, 3, 4, 5, 900]).stats
    assert stats["prompt_tokens_histogram"] == {"1": 1, "2": 1, "4": 2, "8": 1, "1024": 1}


def test_prompts_that_repeat_are_counted_whatever_their_ids():
    rows = [row(index, n, key=f"k{index}") for index, n in enumerate([3, 4, 3, 3, 5])]
    rows.append(row(5, 0, "invalid_input"))
    cutter = ShardCutter(ShardConfig())
    cutter.add(counts(rows, has_id=True), 0)
    assert cutter.finish([]).stats["num_repeated_prompts"] == 2


def test_shared_prefixes_are_estimated():
    prefix = list(range(256))
    counter = Counter()
    found = [counter.num_shared([*prefix, 1000 + n]) for n in range(20)]
    assert found[0] == 0
    assert found[-1] == 256
    assert Counter().num_shared(prefix[:31]) == 0


def test_shards_survive_their_table():
    shards = [
        Shard(shard_id=0, row_start=0, row_end=5, num_prompt_tokens=2**40, num_bad_rows=1),
        Shard(shard_id=1, row_start=5, row_end=6, num_prompt_tokens=0),
    ]
    data = shards_to_bytes(shards)
    assert data == shards_to_bytes(shards)
    assert shards_from_bytes(data, source="t") == shards
    assert shards_from_bytes(shards_to_bytes([]), source="t") == []


def test_a_table_with_a_gap_or_a_flipped_byte_is_refused():
    gap = [Shard(shard_id=0, row_start=1, row_end=5, num_prompt_tokens=1)]
    with pytest.raises(CorruptObject, match="shard 0 does not follow"):
        shards_from_bytes(shards_to_bytes(gap), source="t")
    data = bytearray(shards_to_bytes([dataclasses.replace(gap[0], row_start=0)]))
    data[20] ^= 0xFF
    with pytest.raises(CorruptObject, match="not a table of shards"):
        shards_from_bytes(bytes(data), source="t")


def test_an_id_as_text_is_not_the_same_id_as_a_number():
    assert key_digest(1) != key_digest("1")
    assert key_digest("1") == key_digest("1")


def test_rows_without_an_id_have_no_digest():
    found = counts([row(0, 1), row(1, 1, key="a")], has_id=True)
    assert found.column("digest").is_null() == pa.array([True, False])
