import json
import os
from types import SimpleNamespace

import boto3
import pytest

from storage.errors import BadInput, InputChanged, NotFound, StoreUnavailable
from storage.globs import literal_prefix, matches
from storage.hub_inputs import HubInputs, parse
from storage.inputs import InputFiles
from storage.memory_store import MemoryStore
from storage.object_store import StorageConfig, open_store
from tests.moto_in_turn import moto_in_turn

CONFIG = StorageConfig()
NAMES = [
    "in/b.parquet",
    "in/a.parquet",
    "in/part-10.parquet",
    "in/part-2.parquet",
    "in/sub/c.jsonl.gz",
    "in/_SUCCESS",
    "in/_temporary/d.parquet",
    "in/.a.parquet.crc",
    "in/.hidden/e.parquet",
]
FOUND = ["a.parquet", "b.parquet", "part-10.parquet", "part-2.parquet", "sub/c.jsonl.gz"]


@pytest.fixture(scope="module")
def bucket():
    with pytest.MonkeyPatch.context() as patch, moto_in_turn():
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="inputs")
        yield "s3://inputs"


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """A root URI with the files of NAMES below, in a folder and in buckets."""
    if request.param == "s3":
        root = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    else:
        root = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}-inputs"
    store = open_store(root, CONFIG)
    for name in NAMES:
        store.put(name, name.encode())
    return root


@pytest.fixture
def files(tmp_path):
    return InputFiles(tmp_path / "work", CONFIG)


def names(files, place, uri):
    return [file.uri.removeprefix(f"{place}/in/") for file in files.expand(uri)]


@pytest.mark.parametrize("ending", ["in", "in/"])
def test_a_folder_is_walked_in_key_order_without_markers(files, place, ending):
    assert names(files, place, f"{place}/{ending}") == FOUND


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in/*.parquet", FOUND[:4]),
        ("in/**/*.gz", FOUND[4:]),
        ("in/part-?.parquet", ["part-2.parquet"]),
        ("in/[ab].parquet", ["a.parquet", "b.parquet"]),
        ("in/[!a].parquet", ["b.parquet"]),
        ("*/a.parquet", ["a.parquet"]),
    ],
)
def test_globs_match_whole_keys(files, place, pattern, expected):
    assert names(files, place, f"{place}/{pattern}") == expected


@pytest.mark.parametrize(
    ("pattern", "key", "is_match"),
    [
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/**c", "a/b/bc", True),
        ("a/*c", "a/b/c", False),
        ("a?c", "a/c", False),
        ("[b-d]*", "c/", False),
        ("[]b]", "]", True),
        ("[a-]", "-", True),
        ("a[b", "a[b", True),
        ("*a" * 60 + "b", "a" * 200, False),  # at once, whatever a regular expression would take
        ("**a" * 60, "a" * 200, True),
    ],
)
def test_a_glob_means_what_it_says(pattern, key, is_match):
    assert matches(key, pattern) == is_match


@pytest.mark.parametrize("pattern", ["[b-a]", "x[!]"])
def test_brackets_that_mean_nothing_are_refused(pattern):
    with pytest.raises(BadInput, match="brackets is empty or the wrong way round"):
        matches("a", pattern)


def test_one_file_is_itself_even_if_its_name_looks_like_a_marker(files, place):
    assert names(files, place, f"{place}/in/_temporary/d.parquet") == ["_temporary/d.parquet"]


def test_a_list_keeps_its_own_order(files, place):
    uris = [f"{place}/in/part-2.parquet", f"{place}/in/a.parquet"]
    assert names(files, place, uris) == ["part-2.parquet", "a.parquet"]


def test_a_file_named_twice_is_refused(files, place):
    with pytest.raises(BadInput, match=r"a\.parquet: named twice"):
        files.expand([f"{place}/in/*.parquet", f"{place}/in/a.parquet"])


@pytest.mark.parametrize("uri", ["in/*.csv", "in/_temporary/*.csv", "none/*.parquet"])
def test_nothing_found_names_what_was_looked_for(files, place, uri):
    with pytest.raises(BadInput, match=r"no input files there \(looked for \.parquet"):
        files.expand(f"{place}/{uri}")


def test_a_place_that_does_not_exist_is_refused(files, place):
    with pytest.raises(BadInput, match="nowhere"):
        files.expand(f"{place}/nowhere")


def test_a_file_of_unknown_kind_in_a_folder_is_refused_not_skipped(files, place):
    open_store(place, CONFIG).put("in/notes.txt", b"x")
    with pytest.raises(BadInput, match=r"notes\.txt: not a kind of input file"):
        files.expand(f"{place}/in")
    assert names(files, place, f"{place}/in/*.parquet") == FOUND[:4]


def test_an_empty_list_is_refused(files):
    with pytest.raises(BadInput, match="names nothing"):
        files.expand([])


def test_odd_names_stay_as_they_are(files, tmp_path):
    store = open_store(str(tmp_path), CONFIG)
    odd = ["My Data=1/part 0.parquet", "a=b/c:d.parquet", "d\u00f3nde/\u30d1.parquet"]
    for name in odd:
        store.put(f"in put/{name}", b"x")
    found = [file.uri for file in files.expand(f"{tmp_path}/in put")]
    assert found == [f"{tmp_path}/in put/{name}" for name in odd]
    encoded = f"file://{tmp_path}/in%20put/a=b/c:d.parquet"
    assert [file.uri for file in files.expand(encoded)] == [found[1]]


def test_a_name_with_brackets_that_exists_is_that_file(files, tmp_path):
    (tmp_path / "a[1].parquet").write_bytes(b"x")
    assert len(files.expand(f"{tmp_path}/a[1].parquet")) == 1


def test_an_etag_follows_the_bytes_not_the_time(files, tmp_path):
    path = tmp_path / "a.parquet"
    etags = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        etags.append(InputFiles(tmp_path, CONFIG).expand(str(path))[0].etag)
    assert etags[0] == etags[2] != etags[1]


def test_fetching_brings_the_bytes_and_keeps_them(files, place):
    (found,) = files.expand(f"{place}/in/a.parquet")
    path = files.fetch(found.uri, found.etag)
    assert path.read_bytes() == b"in/a.parquet"
    assert files.fetch(found.uri, found.etag) == path


@pytest.mark.parametrize("now", [b"IN/A.PARQUET", None])
@pytest.mark.parametrize("act", ["fetch", "check"])
def test_a_changed_or_missing_file_is_refused_with_both_etags(files, place, now, act):
    (found,) = files.expand(f"{place}/in/a.parquet")
    store = open_store(place, CONFIG)
    store.delete("in/a.parquet")
    if now is not None:
        store.put("in/a.parquet", now)
    with pytest.raises(InputChanged, match=f"ETag was {found.etag}, is ") as caught:
        getattr(files, act)(found.uri, found.etag)
    assert ("is gone" in str(caught.value)) is (now is None)


def test_a_saved_dataset_is_its_data_files_in_their_own_order(files, place):
    store = open_store(place, CONFIG)
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    store.put("saved/state.json", json.dumps(state).encode())
    store.put("saved/dataset_info.json", b"{}")
    for name in ("data-0.arrow", "data-1.arrow"):
        store.put(f"saved/{name}", b"x")
    found = [file.uri.rpartition("/")[2] for file in files.expand(f"{place}/saved")]
    assert found == ["data-1.arrow", "data-0.arrow"]


def test_a_saved_dataset_with_splits_asks_for_one(files, place):
    store = open_store(place, CONFIG)
    store.put("saved/dataset_dict.json", b'{"splits": ["train", "test"]}')
    with pytest.raises(BadInput, match=r"splits train, test; add one to input\.uri"):
        files.expand(f"{place}/saved")


def test_another_state_file_is_not_taken_for_a_dataset(files, place):
    store = open_store(place, CONFIG)
    store.put("other/state.json", b"[]")
    store.put("other/a.parquet", b"x")
    found = [file.uri.rpartition("/")[2] for file in files.expand(f"{place}/other")]
    assert found == ["a.parquet", "state.json"]


@pytest.mark.parametrize(
    ("key", "pattern", "is_match"),
    [
        ("a/b/c.x", "a/**", True),
        ("a/b/c.x", "a/*", False),
        ("a/c.x", "a/**/c.x", True),
        ("a/b\nc.x", "a/*.x", True),
        ("a.x", "a?x", True),
        ("a/x", "a?x", False),
        ("a[1].x", "a[[]1].x", True),
        ("a.x", "a[.x", False),
    ],
)
def test_patterns(key, pattern, is_match):
    assert matches(key, pattern) is is_match


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(BadInput, match="not a glob"):
        matches("a", "[z-a]")


def test_the_literal_prefix_is_a_folder():
    assert literal_prefix("a/b/c*/d") == "a/b"
    assert literal_prefix("*.x") == ""


class Hub:
    """The three calls of `huggingface_hub.HfApi` that inputs make."""

    def __init__(self, folder, paths, fault=None):
        self.folder, self.paths, self.fault, self.calls = folder, paths, fault, []

    def repo_info(self, repo_id, *, repo_type, revision):
        self.calls.append((repo_id, repo_type, revision))
        if self.fault:
            raise self.fault
        return SimpleNamespace(sha="c0ffee")

    def list_repo_tree(self, repo_id, *, repo_type, revision, recursive):
        assert (repo_id, repo_type, revision, recursive) == ("org/name", "dataset", "c0ffee", True)
        yield SimpleNamespace(path="data", tree_id="folder")
        for path in self.paths:
            lfs = SimpleNamespace(sha256=f"lfs-{path}") if path.endswith("parquet") else None
            yield SimpleNamespace(path=path, size=5, blob_id=f"blob-{path}", lfs=lfs)

    def hf_hub_download(self, repo_id, path, *, repo_type, revision, cache_dir):
        assert (repo_id, repo_type, revision) == ("org/name", "dataset", "c0ffee")
        local = self.folder / path.replace("/", "-")
        local.write_bytes(b"rows")
        return str(local)


HUB_PATHS = ["data/b.parquet", "data/a.parquet", "extra.jsonl", "README.md", ".gitattributes"]


def hub_files(tmp_path, hub):
    return InputFiles(tmp_path, CONFIG, hub=HubInputs(tmp_path, api=hub))


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://datasets/org/name", ["data/a.parquet", "data/b.parquet", "extra.jsonl"]),
        ("hf://datasets/org/name@v1/data", ["data/a.parquet", "data/b.parquet"]),
        ("hf://datasets/org/name/data/b*", ["data/b.parquet"]),
        ("hf://datasets/org/name/extra.jsonl", ["extra.jsonl"]),
    ],
)
def test_a_hub_dataset_is_pinned_to_a_commit(tmp_path, uri, expected):
    hub = Hub(tmp_path, HUB_PATHS)
    found = hub_files(tmp_path, hub).expand(uri)
    prefix = "hf://datasets/org/name@c0ffee/"
    assert [file.uri for file in found] == [prefix + path for path in expected]
    assert hub.calls == [("org/name", "dataset", "v1" if "@v1" in uri else None)]
    kinds = {"parquet": "lfs", "jsonl": "blob"}
    assert all(file.etag.split("-")[0] == kinds[file.uri.rsplit(".")[-1]] for file in found)


def test_a_hub_file_is_fetched_by_its_commit(tmp_path):
    files = hub_files(tmp_path, Hub(tmp_path, HUB_PATHS))
    (found,) = files.expand("hf://datasets/org/name/data/a.parquet")
    assert files.fetch(found.uri, found.etag).read_bytes() == b"rows"
    files.check(found.uri, found.etag)


@pytest.mark.parametrize("uri", ["hf://models/a/b", "hf://datasets/name", "hf://datasets//x"])
def test_a_hub_uri_must_name_a_dataset(uri):
    with pytest.raises(BadInput, match="hf://datasets/org/name"):
        parse(uri)


def test_a_hub_that_does_not_answer_can_be_tried_again(tmp_path):
    files = hub_files(tmp_path, Hub(tmp_path, [], fault=ConnectionError("down")))
    with pytest.raises(StoreUnavailable, match="does not answer") as caught:
        files.expand("hf://datasets/org/name")
    assert caught.value.retryable


def test_a_hub_dataset_that_is_not_there_is_not_found(tmp_path):
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    fault = RepositoryNotFoundError("no", response=response)
    with pytest.raises(NotFound, match="no such dataset"):
        hub_files(tmp_path, Hub(tmp_path, [], fault=fault)).expand("hf://datasets/org/name")


def test_a_remote_file_is_downloaded_once_by_many(tmp_path):
    calls = []
    store = MemoryStore()
    store.put("a.parquet", b"x")
    real = store.download

    def download(key, path, *, if_match=None):
        calls.append(key)
        return real(key, path, if_match=if_match)

    store.download = download
    for _ in range(3):
        files = InputFiles(tmp_path, CONFIG, open_store=lambda *_: store)
        (found,) = files.expand("memory://bucket/a.parquet")
        files.fetch(found.uri, found.etag)
    assert calls == ["a.parquet"]
