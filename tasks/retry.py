"""Which failures deserve another attempt. Types decide, never message texts."""

from inference.errors import EngineConfigError, InferenceError, ModelError
from storage.errors import FingerprintMismatch, NoSpace, StorageError, StoreUnfit
from tasks.unforeseen import ShardFault

_RUN_WIDE = (ModelError, EngineConfigError, NoSpace, StoreUnfit, FingerprintMismatch)


def is_retryable(error: BaseException) -> bool:
    """Whether the same work may succeed when tried again."""
    if isinstance(error, InferenceError | StorageError):
        return error.retryable
    if isinstance(error, ShardFault):
        return True
    # A local disk's hiccup may pass; a full disk is typed NoSpace and does not.
    return isinstance(error, ConnectionError | TimeoutError | OSError)


def ends_run(error: BaseException) -> bool:
    """Whether every other shard would fail the same way, so that once is enough."""
    return isinstance(error, _RUN_WIDE)
