"""The whole pipeline on a real S3 server: many objects, odd keys, outages, refusals, and what it asks for."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import keys
from storage.object_store import open_store
from tests.faults.fault_proxy import FOREVER, FaultProxy
from tests.pipeline import CASES, Finished, Nightjar, expected
from tests.processes import results
from tests.seaweed import Seaweed

# Of a shard that is done at the first attempt: its claim, its files, its commit, and what is read of it later.
MAX_REQUESTS_PER_SHARD = 20


@pytest.fixture
def nightjar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Nightjar:
    return Nightjar(tmp_path, capsys)


@pytest.fixture
def proxy(seaweed: Seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    pq.write_table(
        pa.table({"id": list(range(60)), "prompt": [f"say {i}" for i in range(60)]}), path
    )
    return path


def dummy(nightjar: Nightjar, uri: Any, endpoint: str, **settings: Any) -> Finished:
    return nightjar.run(
        "none", uri, engine__backend="dummy", storage__endpoint_url=endpoint, **settings
    )


def table_of(done: Finished, seaweed: Seaweed, folder: Path) -> pa.Table:
    assert done.code == 0, done.err
    return results(open_store(done.document["run"], seaweed.config), folder)


def rows_by_id(table: pa.Table) -> dict[Any, dict[str, Any]]:
    rows = {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows, "an id is there twice"
    return rows


def test_more_objects_than_one_listing_holds_are_all_read(
    nightjar: Nightjar, seaweed: Seaweed, tmp_path: Path
) -> None:
    store = open_store(f"{seaweed.uri}/input", seaweed.config)

    def put(index: int) -> None:
        sink = pa.BufferOutputStream()
        row = {"id": [f"g1-{index:05d}"], "prompt": [f"Say {index % 3 + 6}"]}
        pq.write_table(pa.table(row), sink)
        store.put(f"part-{index:05d}.parquet", sink.getvalue().to_pybytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(1203)))
    store.put("_SUCCESS", b"")
    done = dummy(
        nightjar,
        f"{seaweed.uri}/input",
        seaweed.endpoint_url,
        output__uri=f"{seaweed.uri}/out",
        shards__max_rows=200,
    )
    rows = rows_by_id(table_of(done, seaweed, tmp_path))
    assert sorted(rows) == [f"g1-{index:05d}" for index in range(1203)]
    assert done.document["num_committed_shards"] == 7


def test_keys_with_spaces_and_other_scripts_stay_as_they_are(
    nightjar: Nightjar, seaweed: Seaweed, tmp_path: Path
) -> None:
    case = CASES / "G2-space-and-unicode-keys"
    bucket = open_store(seaweed.uri, seaweed.config)
    for key, name in json.loads((case / "keys.json").read_text())["objects"].items():
        bucket.put(key, (case / name).read_bytes())
    done = nightjar.run(
        "chain-a",
        f"{seaweed.uri}/in put",
        storage__endpoint_url=seaweed.endpoint_url,
        output__uri=f"{seaweed.uri}/out put/día 1",
    )
    rows = rows_by_id(table_of(done, seaweed, tmp_path))
    wanted = expected(case.name)
    assert {i: row["completion"] for i, row in rows.items()} == wanted["text"]
    written = [info.key for info in bucket.list() if not info.key.startswith("in put/")]
    assert written
    for key in written:
        assert key.startswith(wanted["output_keys_begin_exactly_with"])
        assert "%" not in key
    assert (
        nightjar.call("verify", done.document["run"], "--endpoint-url", seaweed.endpoint_url).code
        == 0
    )


def test_an_upload_that_is_refused_first_is_sent_whole_and_generated_once(
    nightjar: Nightjar, seaweed: Seaweed, proxy: FaultProxy, tmp_path: Path
) -> None:
    case = "G10-upload-retry-sends-all"
    rule = proxy.add("status", "^PUT ", count=FOREVER, once_each=True)
    done = nightjar.run(
        "chain-a",
        CASES / case / "input.parquet",
        storage__endpoint_url=proxy.endpoint_url,
        output__uri=f"{seaweed.uri}/g10",
        shards__max_rows=3,
    )
    assert len(rule.seen) > 20, "hardly anything was refused"
    table = table_of(done, seaweed, tmp_path)
    assert len(rows_by_id(table)) == expected(case)["rows_out"]
    run = open_store(done.document["run"], seaweed.config)
    for info in run.list():
        assert info.size > 0 or not info.key.endswith((".parquet", ".json"))
    attempts = [info.key for info in run.list(keys.ATTEMPTS) if info.key.endswith("attempt.json")]
    assert len(attempts) == done.document["num_shards"] == 3
    steps = [json.loads(run.get(keys.metrics(i)))["num_steps"] for i in range(3)]
    quiet = nightjar.run("chain-a", CASES / case / "input.parquet", shards__max_rows=3)
    receipts = [json.loads(path.read_text()) for path in quiet.run.glob("metrics/*.json")]
    assert sum(steps) == sum(receipt["num_steps"] for receipt in receipts)


def test_an_outage_of_twenty_seconds_is_sat_out(
    nightjar: Nightjar, seaweed: Seaweed, proxy: FaultProxy, prompts: Path, tmp_path: Path
) -> None:
    outages: list[float] = []

    def go_away() -> None:
        while not proxy.count("^PUT .*/commits/"):
            time.sleep(0.005)
        rule = proxy.add("drop_before", ".", count=FOREVER)
        outages.append(time.monotonic())
        time.sleep(20)
        rule.count = 0
        outages.append(time.monotonic())

    trouble = threading.Thread(target=go_away)
    trouble.start()
    done = dummy(
        nightjar,
        prompts,
        proxy.endpoint_url,
        output__uri=f"{seaweed.uri}/out",
        shards__max_rows=5,
    )
    ended = time.monotonic()
    trouble.join()
    table = table_of(done, seaweed, tmp_path)
    assert ended > outages[1], "it was done before the store came back"
    assert sorted(rows_by_id(table)) == list(range(60))
    assert done.document["totals"]["num_attempts"] == 12, "what was generated is not done again"


def test_wrong_credentials_are_refused_in_one_line(
    nightjar: Nightjar, seaweed: Seaweed, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    done = dummy(nightjar, prompts, seaweed.endpoint_url, output__uri=f"{seaweed.uri}/out")
    assert done.code == 2
    (line,) = refusal(done)
    assert "check the credentials" in line
    assert "wrong" not in line


def test_a_missing_bucket_is_refused_in_one_line(
    nightjar: Nightjar, proxy: FaultProxy, prompts: Path
) -> None:
    # As AWS says it; this server would make the bucket.
    proxy.add("status", ".", count=FOREVER, status=404, code="NoSuchBucket")
    done = dummy(nightjar, prompts, proxy.endpoint_url, output__uri="s3://no-such-bucket/out")
    assert done.code == 2
    (line,) = refusal(done)
    assert "bucket does not exist" in line


def refusal(done: Finished) -> list[str]:
    assert "Traceback" not in done.err
    return [line for line in done.err.splitlines() if line.startswith("nightjar run: ")]


def test_a_store_that_ignores_conditions_is_refused_naming_the_option(
    nightjar: Nightjar, seaweed: Seaweed, proxy: FaultProxy, prompts: Path, tmp_path: Path
) -> None:
    rule = proxy.add("unless", "^PUT ", count=FOREVER)
    out = f"{seaweed.uri}/out"
    done = dummy(nightjar, prompts, proxy.endpoint_url, output__uri=out)
    assert rule.seen
    assert done.code == 2
    (line,) = refusal(done)
    assert "storage.allow_single_writer" in line
    bucket = open_store(seaweed.uri, seaweed.config)
    assert list(bucket.list()) == [], "nothing is left of the probe"
    several = dummy(
        nightjar,
        prompts,
        proxy.endpoint_url,
        output__uri=out,
        storage__allow_single_writer=True,
        hardware__replicas=2,
    )
    assert several.code == 2
    assert "hardware.replicas is 2" in several.err
    allowed = dummy(
        nightjar,
        prompts,
        proxy.endpoint_url,
        output__uri=out,
        storage__allow_single_writer=True,
    )
    assert len(rows_by_id(table_of(allowed, seaweed, tmp_path))) == 60


def test_a_shard_costs_few_requests(
    nightjar: Nightjar, seaweed: Seaweed, proxy: FaultProxy, prompts: Path
) -> None:
    requests = {}
    for num_shards in (12, 20):  # more than the parts that the report looks into
        before = len(proxy.requests)
        done = dummy(
            nightjar,
            prompts,
            proxy.endpoint_url,
            output__uri=f"{seaweed.uri}/out-{num_shards}",
            shards__max_rows=60 // num_shards,
        )
        assert done.document["num_committed_shards"] == num_shards
        requests[num_shards] = proxy.requests[before:]
    per_shard = (len(requests[20]) - len(requests[12])) / 8
    print(f"{per_shard:.1f} requests per shard, {len(requests[20]) - 20 * per_shard:.0f} per run")
    few, many = (Counter(map(kind_of, requests[num])) for num in (12, 20))
    for kind, count in many.most_common():
        print(f"{count:4} {few[kind]:4}  {kind}")
    assert per_shard < MAX_REQUESTS_PER_SHARD


def kind_of(line: str) -> str:
    """A request without the numbers in it."""
    verb, target, _ = line.split(" ")
    path = re.sub(r"^/test-\w+", "", target)
    return f"{verb} {re.sub(r'[0-9a-f]{12}|[0-9a-f]{10}|[0-9]+', '#', path)}"
