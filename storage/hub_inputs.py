"""Input files on the Hugging Face Hub: `hf://datasets/org/name[@revision][/path or glob]`.

A revision is resolved to its commit when the input is expanded, and the commit is part of each file's
URI, so a file under one URI never changes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from storage import formats
from storage.disk_space import NO_SPACE, free_bytes
from storage.errors import BadInput, NoSpace, NotFound, StoreUnavailable
from storage.globs import has_wildcard, matches
from storage.hub_requests import errno_of

HUB_SCHEME = "hf://"
_DATASETS = "hf://datasets/"


class HubPath(NamedTuple):
    """An hf:// URI taken apart."""

    repo_id: str
    revision: str | None
    path: str


class HubInputs:
    """Lists and downloads dataset files; `api` is a `huggingface_hub.HfApi` or a double of it."""

    def __init__(self, cache_dir: Path, *, api: Any = None) -> None:
        self._cache_dir = cache_dir
        self._given_api = api

    def expand(self, uri: str) -> Iterator[tuple[str, int, str]]:
        """Yield (uri, size, etag) of every data file below, in order of path.

        Raises:
            BadInput: the URI is malformed.
            NotFound: no such dataset or revision.
            StoreUnavailable: the Hub does not answer.
            NoSpace: there is no room for a file (`fetch` alone).
        """
        repo_id, revision, path = parse(uri)
        info = self._call(uri, "repo_info", repo_id, repo_type="dataset", revision=revision)
        entries = self._call(
            uri, "list_repo_tree", repo_id, repo_type="dataset", revision=info.sha, recursive=True
        )
        files = [entry for entry in entries if getattr(entry, "blob_id", None)]
        for file in sorted(files, key=lambda entry: str(entry.path)):
            if _is_wanted(file.path, path):
                etag = file.lfs.sha256 if file.lfs else file.blob_id
                yield f"{_DATASETS}{repo_id}@{info.sha}/{file.path}", file.size, etag

    def fetch(self, uri: str) -> Path:
        """Return the local path of a file that `expand` named. Raises like `expand`."""
        repo_id, revision, path = parse(uri)
        local = self._call(
            uri,
            "hf_hub_download",
            repo_id,
            path,
            repo_type="dataset",
            revision=revision,
            cache_dir=str(self._cache_dir),
        )
        return Path(local)

    def _call(self, uri: str, method: str, *args: Any, **kwargs: Any) -> Any:
        import httpx
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        try:
            found = getattr(self._api(), method)(*args, **kwargs)
            return list(found) if method == "list_repo_tree" else found
        except RepositoryNotFoundError:
            raise NotFound(f"{uri}: no such dataset on the Hub, or no access to it") from None
        except HfHubHTTPError as error:
            raise NotFound(f"{uri}: the Hub refuses: {str(error).splitlines()[0]}") from None
        except (OSError, httpx.HTTPError, RuntimeError) as error:  # RuntimeError: hf-xet's
            if errno_of(error) in NO_SPACE:
                raise NoSpace(
                    f"{uri}: does not fit {self._cache_dir}, {free_bytes(self._cache_dir)} bytes free; "
                    "make room, or name another folder in NIGHTJAR_WORK_DIR"
                ) from None
            raise StoreUnavailable(f"{uri}: the Hub does not answer: {error}") from None

    def _api(self) -> Any:
        if self._given_api is None:
            from huggingface_hub import HfApi

            self._given_api = HfApi()
        return self._given_api


def parse(uri: str) -> HubPath:
    """Take an hf:// URI apart.

    Raises:
        BadInput: it does not name a dataset.
    """
    parts = uri.removeprefix(_DATASETS).split("/", 2)
    if not uri.startswith(_DATASETS) or len(parts) < 2 or not all(parts[:2]):
        raise BadInput(f"{uri}: give hf://datasets/org/name, optionally @revision and /path")
    name, _, revision = parts[1].partition("@")
    path = parts[2].strip("/") if len(parts) == 3 else ""
    return HubPath(f"{parts[0]}/{name}", revision or None, path)


def _is_wanted(path: str, asked: str) -> bool:
    """Whether a repository file is asked for; only data files are, unless named exactly."""
    if path == asked:
        return True
    if any(part.startswith(("_", ".")) for part in path.split("/")):
        return False
    if formats.by_name(path) is None:
        return False
    if has_wildcard(asked):
        return matches(path, asked)
    return not asked or path.startswith(f"{asked}/")
