"""What Prefect's pages are told of a run under way: numbers and names of states."""

from flows.artifacts import table_of
from storage.manifest import CommitRecord, PartFile, PlanManifest
from tasks.outlook import Outlook
from tasks.watch import Look

PLAN = PlanManifest(
    run_id="r",
    fingerprint="f",
    table_digest="t",
    num_shards=4,
    num_rows=200,
    num_samples=2,
    num_prompt_tokens=1,
    num_bad_rows=0,
    bad_rows_by_state={},
    bad_row_examples=[],
    input_schema="",
    inputs=[],
)
COMMIT = CommitRecord(
    shard_id=0,
    revision=1,
    nonce="n",
    attempt=1,
    plan_digest="p",
    row_start=0,
    row_end=50,
    part=PartFile(key="k", size=1, sha256="s", num_rows=100),
    counts={"ok": 90, "truncated": 10},
    receipt={"num_reused_rows": 40},
    holder="h",
    committed_at="",
)


def outlook(**changes):
    values = {
        "at": "2026-11-25T20:00:00+00:00",
        "num_shards_left": 3,
        "num_replicas": 2,
        "is_running": True,
        "completion_tokens_per_s": 1234.5,
    }
    return Outlook(**{**values, **changes})


def test_the_table_has_what_is_known_and_leaves_out_what_is_not():
    found = table_of(Look(plan=PLAN, commits={0: COMMIT}, outlook=outlook()))
    assert found == [
        ("rows", "100 of 400"),
        ("shards", "1 of 4"),
        ("ok", "90"),
        ("truncated", "10"),
        ("replicas", "2"),
        ("copied from earlier runs", "40"),
        ("tokens/s", "1,234.50"),
        ("as of", "2026-11-25T20:00:00+00:00"),
    ]
    late = outlook(warning="P90 finish is past the deadline", is_running=False, usd=2.0)
    told = dict(table_of(Look(plan=PLAN, commits={}, outlook=late)))
    assert told["warning"] == "P90 finish is past the deadline"
    assert (told["replicas"], told["spent, $"]) == ("0", "2.00")
