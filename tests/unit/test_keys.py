import pytest

from storage import keys


def test_keys_are_spelled_as_the_run_folder_is_documented() -> None:
    assert keys.completions(42) == "completions/part-00042.parquet"
    assert keys.metrics(42) == "metrics/part-00042.json"
    assert keys.commit(42) == "commits/00042.json"
    assert keys.commit(42, 2) == "commits/00042.r2.json"
    assert keys.manifest() == "manifest.json"
    assert keys.manifest(3) == "manifest.r3.json"
    assert keys.attempt(42, 3, "completions.parquet") == "_attempts/00042/003/completions.parquet"
    assert keys.lease(42) == "_leases/00042.json"
    assert (
        keys.converted_input(3, "sha256:" + "ab" * 32) == "_inputs/00003-abababababababab.parquet"
    )


@pytest.mark.parametrize("shard_id", [0, 42, 99_999, 123_456])
def test_keys_are_read_back_as_they_were_spelled(shard_id: int) -> None:
    for revision in (1, 2, 10):
        assert keys.parse_commit(keys.commit(shard_id, revision)) == (shard_id, revision)
        assert keys.parse_manifest(keys.manifest(revision)) == revision
    for number in (1, 999, 1000):
        key = keys.attempt(shard_id, number, "failed.json")
        assert keys.parse_attempt(key) == (shard_id, number, "failed.json")


@pytest.mark.parametrize(
    "key", ["commits/42.json", "commits/00042.r.json", "manifest.json.bak", "_attempts/00042/x/y"]
)
def test_other_keys_are_not_taken_for_ours(key: str) -> None:
    assert keys.parse_commit(key) is None
    assert keys.parse_manifest(key) is None
    assert keys.parse_attempt(key) is None


def test_commits_of_one_shard_share_a_prefix_that_no_other_shard_has() -> None:
    assert keys.commit(12_345).startswith("commits/12345.")
    assert keys.commit(12_345, 2).startswith("commits/12345.")
    assert not keys.commit(123_456).startswith("commits/12345.")
