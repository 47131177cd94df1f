"""Twenty files through an inbox on a real S3 server: each ends where it should, and says why."""

import gzip
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.cli import main
from flows.inbox_jobs import InboxJobs
from storage.object_store import ObjectStore, open_store
from storage.s3_client import make_client
from tasks.inbox import Scan, scan
from tests.seaweed import Seaweed

pytestmark = pytest.mark.slow

NOW = datetime(2026, 11, 25, 18, 0, tzinfo=UTC)


def parquet(
    prompts: list[str | None], ids: list[int] | None = None, column: str = "prompt"
) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids or range(len(prompts)), column: prompts}), sink)
    return bytes(sink.getvalue())


def lines(*prompts: str) -> bytes:
    return b"".join(
        json.dumps({"id": i, "prompt": text}).encode() + b"\n" for i, text in enumerate(prompts)
    )


@dataclass(frozen=True)
class Drop:
    """A file, and the word of its letter that tells why, when it is not accepted."""

    data: bytes
    rejected_for: str | None = None
    sidecar: str | None = None


WHOLE = parquet(["one", "two", "three"])
DROPS = {
    "a-plain.parquet": Drop(WHOLE),
    "b-lines.jsonl": Drop(lines("one", "two")),
    "c-lines.jsonl.gz": Drop(gzip.compress(lines("one", "two", "three"), mtime=0)),
    "d-table.csv": Drop(b"id,prompt\n1,one\n2,two\n"),
    "e-one-bad-row.parquet": Drop(parquet(["one", None, "three"])),
    "f-in a folder/p\u00e4rt 1.parquet": Drop(WHOLE),
    "g-with-settings.parquet": Drop(
        parquet(["one"], column="text"), sidecar="input: {prompt: 'Shout {text}'}\nafter: '20:00'\n"
    ),
    "h-same-content-other-name.parquet": Drop(WHOLE),
    "i-cut.parquet": Drop(WHOLE[:-30], "i-cut.parquet"),
    "j-not-parquet.parquet": Drop(b"hello", "j-not-parquet.parquet"),
    "k-no-rows.parquet": Drop(parquet([]), "no rows"),
    "l-all-null.parquet": Drop(parquet([None, None]), "None of its 2 rows"),
    "m-other-column.parquet": Drop(parquet(["one"], column="text"), "text"),
    "n-repeated-ids.parquet": Drop(parquet(["one", "two"], ids=[7, 7]), "7"),
    "o-wrong-settings.parquet": Drop(
        WHOLE, "did you mean sampling?", sidecar="smapling: {max_tokens: 3}\n"
    ),
    "p-not-settings.parquet": Drop(WHOLE, "expected a mapping", sidecar="- one\n- two\n"),
}
LEFT_ALONE = {"q-notes.txt": b"hello", "_hidden.parquet": WHOLE, ".r-hidden.parquet": WHOLE}
HALF_WRITTEN = "s-half-written.parquet"


class Box:
    """An inbox in a bucket, and what a test does with it."""

    def __init__(self, seaweed: Seaweed, folder: Path) -> None:
        self.folder, self.seaweed = folder, seaweed
        self.store: ObjectStore = open_store(f"{seaweed.uri}/night", seaweed.config)
        base = {
            "name": "inbox",
            "model": {"source": "none"},
            "input": {"prompt": "Say: {prompt}", "id_column": "id"},
            "output": {"uri": f"{seaweed.uri}/results"},
            "storage": {"endpoint_url": seaweed.endpoint_url},
            "sampling": {"max_tokens": 8},
            "engine": {"backend": "dummy"},
        }
        (folder / "inbox.yaml").write_text(yaml.safe_dump(base))
        (folder / "work").mkdir()

    def drop(self, name: str, data: bytes, sidecar: str | None = None) -> None:
        if sidecar is not None:
            self.store.put(f"inbox/{name}.yaml", sidecar.encode())
        self.store.put(f"inbox/{name}", data)

    def look(self) -> Scan:
        jobs = InboxJobs.read(str(self.folder / "inbox.yaml"))
        work = self.folder / "work"
        return scan(self.store, storage=jobs.storage, jobs=jobs, work_dir=work, now=NOW)

    def names(self, prefix: str = "") -> set[str]:
        return {info.key for info in self.store.list(prefix)}

    def letters(self, state: str) -> dict[str, dict[str, Any]]:
        keys = [key for key in self.names(f"{state}/") if key.endswith("preflight.json")]
        found = [json.loads(self.store.get(key)) for key in keys]
        return {letter["file"]: letter for letter in found}


@pytest.fixture
def box(seaweed: Seaweed, tmp_path: Path) -> Box:
    return Box(seaweed, tmp_path)


def test_twenty_files_end_where_they_should(
    box: Box, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint_url)
    for name, drop in DROPS.items():
        box.drop(name, drop.data, drop.sidecar)
    for name, data in LEFT_ALONE.items():
        box.drop(name, data)
    client = make_client(seaweed.config)
    target = {"Bucket": seaweed.bucket, "Key": f"night/inbox/{HALF_WRITTEN}"}
    upload = {**target, "UploadId": client.create_multipart_upload(**target)["UploadId"]}
    part = client.upload_part(**upload, PartNumber=1, Body=WHOLE)
    assert len(DROPS) + len(LEFT_ALONE) + 1 == 20

    found = box.look()
    good = {name for name, drop in DROPS.items() if drop.rejected_for is None}
    assert set(found.accepted) == set(box.letters("accepted")) == good
    assert set(found.rejected) == set(box.letters("rejected")) == set(DROPS) - good
    for name, letter in box.letters("rejected").items():
        assert str(DROPS[name].rejected_for) in letter["reason"], name
    assert {key.removeprefix("inbox/") for key in box.names("inbox/")} == set(LEFT_ALONE)
    queued = {submission.submission_id: submission for submission in found.queued}
    assert len(queued) == len(good)
    (later,) = [one for one in queued.values() if one.after is not None]
    assert later.submission_id.startswith("g-with-settings-")
    assert later.after == NOW.replace(hour=20)

    # The upload is completed; good ones come again; a rejected one comes repaired, another changed.
    client.complete_multipart_upload(
        **upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )
    before = box.names("accepted/")
    box.drop("a-plain.parquet", WHOLE)
    box.drop("d-table.csv", DROPS["d-table.csv"].data)
    box.drop("i-cut.parquet", WHOLE)
    box.drop("e-one-bad-row.parquet", parquet(["one", "two", "three"]))
    box.drop("j-not-parquet.parquet", b"hello")
    again = box.look()
    assert again.rejected == ["j-not-parquet.parquet"]
    assert len(again.accepted) == 5
    new = {one.submission_id for one in again.queued} - set(queued)
    assert {name.rsplit("-", 1)[0] for name in new} == {
        "s-half-written",
        "i-cut",
        "e-one-bad-row",
    }
    assert before < box.names("accepted/")
    assert {key.removeprefix("inbox/") for key in box.names("inbox/")} == set(LEFT_ALONE)

    # Two are worked on (the other is `part 1` of a folder); only they are done, with a link to what is really there.
    worked = [one for one in again.queued if one.submission_id[0] in "ap"]
    assert len(worked) == 2
    for submission in worked:
        assert main(["run", submission.job_uri, "--json"]) == 0
    last = box.look()
    assert sorted(last.done) == sorted(one.submission_id for one in worked)
    assert len(last.queued) == len(good) + 3 - 2
    for submission_id in last.done:
        result = json.loads(box.store.get(f"done/{submission_id}/result.json"))
        assert main(["verify", result["run"], "--json"]) == 0
        listed = open_store(result["completions"], seaweed.config).list()
        assert [info.key for info in listed] == ["part-00000.parquet"]
        assert result["completions"].encode() in box.store.get(f"done/{submission_id}/result.md")
    assert box.look().done == []
    client.close()
