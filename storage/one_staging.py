"""One staging of one model: find it, read it in place, or fill a folder of a cache with it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.destinations import EngineMemory, disk_kind
from storage.disk_speed import disk_speed
from storage.errors import BadInput, NoSpace
from storage.file_lock import FileLock
from storage.in_place import good_disk, read_in_place, with_own_id
from storage.local_source import LocalSource
from storage.model_cache import ModelCache, use_entry
from storage.model_caches import ANYWHERE, Place, open_places, place_model
from storage.model_fill import Fill, Filled, FillOptions
from storage.model_listing import Listing, Source, list_model, open_source
from storage.model_manifest import ModelManifest
from storage.object_store import StorageConfig
from storage.stage_report import PhaseTimer, StageReport, wire_gb_per_s
from storage.stage_turn import StageTurn

_WORTH_MEASURING_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedModel:
    """A whole model on a local disk; not evicted until it is closed."""

    path: Path
    content_id: str
    manifest: ModelManifest
    report: StageReport
    lock: FileLock | None
    """Held while the model is used; None when it is read in place, outside any cache."""

    def close(self) -> None:
        """Allow the model to be evicted."""
        if self.lock:
            self.lock.close()

    def __enter__(self) -> "StagedModel":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Staging:
    """One call of `storage.staging.stage_model`, whose arguments and errors it has."""

    def __init__(
        self,
        *,
        stage_to: str,
        engine_memory: Callable[[int], EngineMemory],
        budget_bytes: int | None,
        options: FillOptions,
    ) -> None:
        self._stage_to = stage_to
        self._engine_memory = engine_memory
        self._budget_bytes = budget_bytes
        self._options = options
        self._timer = PhaseTimer()
        self._filled = Filled()

    def run(
        self, source: str, config: StorageConfig, *, only_near: bool = False
    ) -> StagedModel | None:
        with self._timer("resolve"):
            places = open_places(self._stage_to)
            opened = open_source(source, config, places, self._options.retry)
            reason = self._why_in_place(opened)
        if reason:
            return self._in_place(opened, reason)
        with self._timer("list"):
            listing = list_model(opened, gguf_dtype=self._options.gguf_dtype)
        found = self._find(places, listing)
        if found or only_near:
            return found
        try:
            return self._stage(places, listing)
        except NoSpace as error:
            if self._stage_to != "auto" or not _is_folder(opened):
                raise
            return self._in_place(opened, f"read in place, from a network disk: {error}")

    def _why_in_place(self, source: Source) -> str:
        is_folder = _is_folder(source)
        if self._stage_to == "none" and not is_folder:
            raise BadInput(f"{source.uri}: cannot be read in place; use stage_to auto or a folder")
        if self._stage_to == "none":
            return "read in place, as asked"
        if self._stage_to == "auto" and is_folder and isinstance(source, LocalSource):
            return good_disk(source)
        return ""

    def _in_place(self, source: Source, reason: str) -> StagedModel:
        assert isinstance(source, LocalSource), "only folders are read in place"
        path, lock = source.path, use_entry(source.path)
        try:
            with self._timer("list"):
                listing = with_own_id(list_model(source))
            with self._timer("check"):
                manifest = read_in_place(listing, allowed_code=self._options.allowed_code)
            report = self._report(listing, path, manifest, "in place", reason)
        except BaseException:
            if lock:
                lock.close()
            raise
        return StagedModel(
            path=path, content_id=listing.content_id, manifest=manifest, report=report, lock=lock
        )

    def _find(self, places: list[Place], listing: Listing) -> StagedModel | None:
        """The model where it is already staged, on whatever disk."""
        for _, cache in places:
            if cache.path(listing.content_id).exists():
                lock = cache.use(listing.content_id)
                if cache.manifest(listing.content_id):
                    return self._staged(listing, cache, lock, "hit", "it was staged already")
                lock.close()
        return None

    def _stage(self, places: list[Place], listing: Listing) -> StagedModel:
        refusals: list[str] = []
        while True:
            place, reason = place_model(
                places,
                listing.content_id,
                num_bytes=listing.staged_bytes,
                engine=self._engine_memory(listing.staged_bytes),
                budget_bytes=self._budget_bytes,
                is_named=self._stage_to not in ANYWHERE,
            )
            try:
                return self._stage_at(place, listing, "; ".join([*refusals, reason]))
            except NoSpace as error:
                place.cache.discard(listing.content_id)
                places = [other for other in places if other != place]
                refusals.append(str(error))
                if not places:
                    raise

    def _stage_at(self, place: Place, listing: Listing, reason: str) -> StagedModel:
        cache, name = place.cache, listing.content_id
        lock = cache.use(name)
        try:
            with self._timer("wait"):
                turn = StageTurn(cache, listing, self._options).take()
            with turn:
                if cache.manifest(name):
                    return self._staged(listing, cache, lock, "hit", "another process staged it")
                self._filled = self._fill(place, listing)
            return self._staged(listing, cache, lock, "staged", reason)
        except BaseException:
            lock.close()
            raise

    def _fill(self, place: Place, listing: Listing) -> Filled:
        return Fill(
            listing,
            place.cache,
            direct=place.destination.kind != "memory",
            budget_bytes=self._budget_bytes,
            options=self._options,
            timer=self._timer,
        ).run()

    def _staged(
        self,
        listing: Listing,
        cache: ModelCache,
        lock: FileLock,
        outcome: Literal["staged", "hit"],
        reason: str,
    ) -> StagedModel:
        path, manifest = cache.path(listing.content_id), cache.manifest(listing.content_id)
        assert manifest is not None, f"{path} was touched while it was published"
        report = self._report(listing, path, manifest, outcome, reason)
        return StagedModel(
            path=path, content_id=listing.content_id, manifest=manifest, report=report, lock=lock
        )

    def _report(
        self,
        listing: Listing,
        path: Path,
        manifest: ModelManifest,
        outcome: Literal["staged", "hit", "in place"],
        reason: str,
    ) -> StageReport:
        filled, kind = self._filled, disk_kind(path)
        totals = self._timer.totals()
        is_worth_it = kind != "memory" and filled.bytes_moved >= _WORTH_MEASURING_BYTES
        speed = disk_speed(path.parents[1]) if is_worth_it else None
        return StageReport(
            source=listing.source.uri,
            content_id=listing.content_id,
            path=str(path),
            outcome=outcome,
            reason=reason,
            disk=kind,
            num_files=len(manifest.files),
            num_bytes=manifest.num_bytes,
            bytes_moved=filled.bytes_moved,
            bytes_resumed=filled.bytes_resumed,
            huge_bytes=filled.huge_bytes,
            thread_s=filled.thread_s,
            num_retries=filled.num_retries,
            wire_gb_per_s=None if isinstance(listing.source, LocalSource) else wire_gb_per_s(),
            disk_write_gb_per_s=speed.write_gb_per_s if speed else None,
            disk_read_gb_per_s=speed.read_gb_per_s if speed else None,
            verified_by=dict(Counter(file.verified_by for file in manifest.files)),
            skipped=manifest.skipped,
            evicted=filled.evicted,
            **totals,
        )


def _is_folder(source: Source) -> bool:
    return isinstance(source, LocalSource) and source.path.is_dir()
