"""What goes from a cache of models: the least recently used for those that come, and what was left behind."""

import shutil
import time

from storage.disk_space import free_bytes, no_space, used_bytes
from storage.errors import NoSpace
from storage.model_cache import TRASH_PREFIX, CacheEntry, Eviction, ModelCache


def make_room(
    cache: ModelCache, num_bytes: int, *, budget_bytes: int | None = None, keep: str = ""
) -> list[str]:
    """Evict least recently used models until `num_bytes` more fit the disk and the budget.

    Call while holding `cache.reserve()`. `keep` is the model that is being staged, of which
    `num_bytes` are still to be reserved. Returns the content ids that went.

    Raises:
        NoSpace: it would not fit with every idle model gone, and none was evicted; or one that
            was idle is in use by now.
    """
    gone: list[str] = []
    entries = cache.entries()
    used = sum(entry.num_bytes for entry in entries)
    idle = [entry for entry in entries if entry.is_idle and entry.content_id != keep]
    idle_bytes = sum(entry.num_bytes for entry in idle)
    if not _fits(cache, num_bytes - idle_bytes, used, budget_bytes):
        raise _no_room(cache, num_bytes, used - idle_bytes, budget_bytes)
    for entry in idle:
        if _fits(cache, num_bytes, used, budget_bytes):
            break
        eviction = cache.evict(entry.content_id)
        used -= eviction.freed_bytes
        gone += [entry.content_id] if not eviction.kept_because else []
    if not _fits(cache, num_bytes, used, budget_bytes):
        raise _no_room(cache, num_bytes, used, budget_bytes)
    return gone


def gc(
    cache: ModelCache,
    *,
    min_age_s: float = 3600.0,
    budget_bytes: int | None = None,
    dry_run: bool = False,
) -> list[Eviction]:
    """Delete what was left behind: half-deleted models, and partial ones nobody works on.

    With `budget_bytes`, idle models go too, least recently used first, until the rest keeps to
    it; those that are kept though it does not are listed. `dry_run` deletes nothing.
    """
    gone = []
    if cache.models.is_dir():
        for trash in cache.models.glob(f"{TRASH_PREFIX}*"):
            gone.append(Eviction(trash.name, used_bytes(trash), ""))
            if not dry_run:
                shutil.rmtree(trash, ignore_errors=True)
    entries = cache.entries()
    left_behind = {
        entry.content_id
        for entry in entries
        if not entry.is_whole and time.time() - entry.last_used_at >= min_age_s
    }
    used = sum(entry.num_bytes for entry in entries)
    kept: list[Eviction] = []
    for entry in sorted(entries, key=lambda entry: entry.content_id not in left_behind):
        is_over = budget_bytes is not None and used > budget_bytes
        if not is_over and entry.content_id not in left_behind:
            continue
        eviction = _would_evict(entry) if dry_run else cache.evict(entry.content_id)
        used -= eviction.freed_bytes
        (kept if eviction.kept_because else gone).append(eviction)
    return gone + kept if budget_bytes is not None and used > budget_bytes else gone


def _would_evict(entry: CacheEntry) -> Eviction:
    reason = "it is pinned" if entry.is_pinned else "a process is using it"
    return Eviction(entry.content_id, *((entry.num_bytes, "") if entry.is_idle else (0, reason)))


def _fits(cache: ModelCache, num_bytes: int, used_bytes: int, budget_bytes: int | None) -> bool:
    if budget_bytes is not None and used_bytes + num_bytes > budget_bytes:
        return False
    return num_bytes <= free_bytes(cache.root)


def _no_room(
    cache: ModelCache, num_bytes: int, used_bytes: int, budget_bytes: int | None
) -> NoSpace:
    limit = f", budget {budget_bytes} of which {used_bytes} are pinned or in use"
    return no_space(cache.root, num_bytes, limit=limit if budget_bytes is not None else "")
