"""Every model cache of this node, as one: list, pin, evict, collect what was left behind.

A model is named by its content id, by the beginning of it, or by the source it was staged from.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from storage import cache_room
from storage.destinations import (
    Destination,
    EngineMemory,
    choose,
    describe,
    find_destinations,
    host_memory,
)
from storage.errors import AccessDenied, BadInput, NoSpace, NotFound
from storage.model_cache import CacheEntry, Eviction, ModelCache


class Place(NamedTuple):
    """A destination and the cache in it."""

    destination: Destination
    cache: ModelCache


ANYWHERE = {"auto", "none", "shm", "nvme"}
"""Words for `stage_to` that leave the folder to us."""


def open_places(stage_to: str) -> list[Place]:
    """The caches that models may be staged to, prepared.

    `stage_to`: a folder; or auto (whatever the node offers), shm (in memory only), nvme (local disks
    only), none (as auto: for what must be remembered even when models are read in place).

    Raises:
        AccessDenied, NoSpace: the named folder cannot be used.
    """
    if stage_to not in ANYWHERE:
        root = Path(stage_to).expanduser().absolute()
        ModelCache(root).prepare()
        return [Place(describe(root), ModelCache(root))]
    places = []
    for destination in find_destinations():
        if stage_to in ("shm", "nvme") and (destination.kind == "memory") != (stage_to == "shm"):
            continue
        cache = ModelCache(destination.root)
        try:
            cache.prepare()
        except (AccessDenied, NoSpace):  # a read-only home, say; the others may do
            continue
        places.append(Place(destination, cache))
    return places


def roots_of(stage_to: str) -> list[Path] | None:
    """The `roots` to look in for what was staged with `stage_to`: one folder, or None for all of ours."""
    return None if stage_to in ANYWHERE else [Path(stage_to).expanduser().absolute()]


def list_staged(roots: Iterable[Path] | None = None) -> list[CacheEntry]:
    """Every model on this node, whole or not, least recently used first in each cache."""
    return [entry for cache in _caches(roots) for entry in cache.entries()]


def pin(
    model: str, *, pinned: bool = True, roots: Iterable[Path] | None = None
) -> list[CacheEntry]:
    """Keep a model from eviction, or let go of it again. Raises NotFound, BadInput."""
    matches = _matching(model, roots)
    for cache, entry in matches:
        cache.pin(entry.content_id, pinned)
    return [entry._replace(is_pinned=pinned) for _, entry in matches]


def evict(model: str, *, roots: Iterable[Path] | None = None) -> list[Eviction]:
    """Delete a model from every cache, pinned or not, but not while somebody uses it.

    Raises:
        NotFound, BadInput: no model has that name, or several have.
    """
    return [
        cache.evict(entry.content_id, even_pinned=True) for cache, entry in _matching(model, roots)
    ]


def gc(
    *,
    min_age_s: float = 3600.0,
    budget_bytes: int | None = None,
    dry_run: bool = False,
    roots: Iterable[Path] | None = None,
) -> list[Eviction]:
    """Delete partial models that nobody has worked on for `min_age_s`, and half-deleted ones.

    Args:
        budget_bytes: most bytes of a cache; its least recently used models go until it keeps to that.
        dry_run: only say what would go.
    """
    return [
        eviction
        for cache in _caches(roots)
        for eviction in cache_room.gc(
            cache, min_age_s=min_age_s, budget_bytes=budget_bytes, dry_run=dry_run
        )
    ]


def _caches(roots: Iterable[Path] | None) -> list[ModelCache]:
    if roots is None:
        roots = [destination.root for destination in find_destinations()]
    return [ModelCache(root) for root in roots if (root / "models").is_dir()]


def _matching(model: str, roots: Iterable[Path] | None) -> list[tuple[ModelCache, CacheEntry]]:
    everything = [(cache, entry) for cache in _caches(roots) for entry in cache.entries()]
    matches = [
        (cache, entry)
        for cache, entry in everything
        if entry.source.rstrip("/") == model.rstrip("/") or entry.content_id.startswith(model)
    ]
    if not matches:
        known = ", ".join(entry.source or entry.content_id for _, entry in everything) or "none"
        raise NotFound(f"{model}: not staged on this node; staged: {known}")
    if len({entry.content_id for _, entry in matches}) > 1:
        names = ", ".join(entry.content_id for _, entry in matches)
        raise BadInput(f"{model}: {len(matches)} staged models match: {names}; name one")
    return matches


class Placement(NamedTuple):
    """Where a model is to be staged, and the arithmetic behind it."""

    place: Place
    reason: str


def place_model(
    places: list[Place],
    content_id: str,
    *,
    num_bytes: int,
    engine: EngineMemory,
    budget_bytes: int | None = None,
    is_named: bool = False,
) -> Placement:
    """Decide once per node where a model goes: whoever comes second joins the first one's place.

    `is_named`: the caller named the only place, so nothing is weighed. What could be evicted counts
    as free.

    Raises:
        NoSpace: it fits nowhere; the message has the arithmetic for every place.
    """
    if not places:
        raise NoSpace("no folder to stage to can be written; name one with stage_to")
    with places[0].cache.reserve():
        for place in places:
            if place.cache.path(content_id).exists():
                return Placement(place, f"joined {place.cache.root}, where its staging began")
        if is_named:
            placement = Placement(places[0], f"staged to {places[0].cache.root}, as asked")
        else:
            placement = _best(places, num_bytes, engine, budget_bytes)
        placement.place.cache.path(content_id).mkdir(mode=0o700)
        return placement


def _best(
    places: list[Place], num_bytes: int, engine: EngineMemory, budget_bytes: int | None
) -> Placement:
    memory = host_memory()
    destinations = []
    for destination, cache in places:
        evictable = cache.evictable_bytes()
        room = destination.free_bytes + evictable
        if budget_bytes is not None:
            room = min(room, budget_bytes - cache.bytes_on_disk() + evictable)
        destinations.append(replace(destination, free_bytes=room))
        if destination.kind == "memory":
            memory = memory._replace(available_bytes=memory.available_bytes + evictable)
    choice = choose(num_bytes, engine=engine, memory=memory, destinations=destinations)
    if choice.destination is None:
        raise NoSpace(f"the model fits nowhere: {choice.reason}; make room or add a disk")
    roots = [destination.root for destination in destinations]
    return Placement(places[roots.index(choice.destination.root)], choice.reason)
