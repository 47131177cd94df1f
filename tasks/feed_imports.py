"""What a feed's child spares itself of the libraries it imports: each new child pays for all of it."""

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa


@contextmanager
def torch_hidden() -> Iterator[None]:
    """Let transformers load a tokenizer without torch, which it would import if it could see it.

    Measured: 190 MB and half the start-up time less; with CUDA libraries, more.
    """
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name == "torch" else find_spec(name, package)
    )
    try:
        yield
    finally:
        importlib.util.find_spec = find_spec


@contextmanager
def folders_read_once() -> Iterator[None]:
    """Let transformers keep what it finds in each of its models' folders.

    It reads all 1,700 files when it is imported and again when its models are: it remembers the last 128 of
    560 folders. Measured: a fifth of the start-up time.
    """
    lru_cache = functools.lru_cache

    def remember(*args: Any, **kwargs: Any) -> Any:
        if args and getattr(args[0], "__name__", "") == "create_import_structure_from_path":
            return functools.cache(args[0])
        return lru_cache(*args, **kwargs)

    functools.lru_cache = remember
    try:
        yield
    finally:
        functools.lru_cache = lru_cache


class _NoPandas(importlib.abc.MetaPathFinder):
    """Says that there is no pandas."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def forget_pandas() -> None:
    """Let Arrow look for pandas, once, and not find it.

    With pandas it gives that library's timestamps instead of Python's, and a prompt must not hang on what
    else is installed; it also takes a tenth of a second to import.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    pa.array([0])
    sys.meta_path.remove(finder)
