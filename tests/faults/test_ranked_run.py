"""A whole job on two ranks: killed in the middle, resumed, and the same text as on one."""

import json
import os
import signal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.local_store import LocalStore
from tests.processes import (
    REPOSITORY,
    Cli,
    children,
    cli_in,
    is_alive,
    kill,
    results,
    wait_for,
)

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: tensor parallel needs it")

NUM_ROWS = 60
PATIENCE_S = 280.0
RANK = "-u -m inference"
TEXTS = ["one two three", "seven", "Hello", "twenty one", "four five"]


def job(cli: Cli, size: int, **settings: Any) -> str:
    prompts = cli.folder / "prompts.parquet"
    if not prompts.exists():
        texts = [f"{TEXTS[row % 5]} {TEXTS[row % 3]}" for row in range(NUM_ROWS)]
        pq.write_table(pa.table({"prompt": texts}), prompts)
    path = cli.job(
        f"ranks-{size}",
        model={
            "source": str(REPOSITORY / "tests" / "data" / "models" / "tiny-a"),
            "dtype": "float32",
        },
        engine={"backend": "paged", "tensor_parallel_size": size, "max_num_seqs": 4},
        input={"uri": str(prompts), "prompt_column": "prompt"},
        sampling={"max_tokens": 60, "temperature": 0.8, "ignore_eos": True},
        shards={"max_rows": 10},
        canary={"rows": 0},
        run_id=f"run-{size}",
        **settings,
    )
    return str(path)


@pytest.mark.timeout(1200)
def test_a_job_on_two_ranks_survives_its_own_and_a_ranks_death_and_gives_the_text_of_one(tmp_path):
    store = LocalStore(tmp_path / "out" / "run-2")
    with cli_in(tmp_path) as cli:
        first = cli.start("run", job(cli, 2))
        wait_for(lambda: list(store.list(keys.COMMITS)), timeout_s=PATIENCE_S, what="a commit")
        ranks = children(first.pid, RANK)
        assert len(ranks) == 2
        assert kill(first)
        wait_for(lambda: not any(map(is_alive, ranks)), what="the ranks to end with the run")
        assert 0 < len(list(store.list(keys.COMMITS))) < 6

        second = cli.start("run", job(cli, 2), "--json")
        ranks = wait_for(
            lambda: found if len(found := children(second.pid, RANK)) == 2 else None,
            timeout_s=PATIENCE_S,
            what="two ranks",
        )
        os.kill(max(ranks), signal.SIGKILL)
        out, err = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 0, err
        assert "all ranks were stopped" in err
        assert json.loads(out.splitlines()[-1])["num_rows"] == NUM_ROWS
        assert not any(map(is_alive, ranks))
        receipts = [json.loads(store.get(info.key)) for info in store.list(keys.METRICS)]
        assert {receipt["engine"]["num_ranks"] for receipt in receipts} == {2}

        alone = cli.call("run", job(cli, 1), "--json")
        assert alone.returncode == 0, alone.stderr
        found, expected = (
            results(LocalStore(tmp_path / "out" / f"run-{size}"), tmp_path) for size in (2, 1)
        )
        assert found.sort_by("row_index") == expected.sort_by("row_index")


def test_ranks_that_do_not_divide_the_heads_are_refused_before_anything_is_planned(tmp_path):
    with cli_in(tmp_path) as cli:
        refused = cli.call("run", job(cli, 3))
    assert refused.returncode == 2
    assert "tensor parallel 3 does not divide 2 KV heads and 4 attention heads; use 1 or 2" in (
        " ".join(refused.stderr.split())
    )
    assert not (tmp_path / "out" / "run-3").exists()
