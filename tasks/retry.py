"""Which failures deserve another attempt. Types decide, never message texts."""

from inference.errors import InferenceError
from storage.errors import StorageError


def is_retryable(error: BaseException) -> bool:
    """Whether the same work may succeed when tried again."""
    if isinstance(error, InferenceError | StorageError):
        return error.retryable
    # A local disk's hiccup may pass; a full disk is typed NoSpace and does not.
    return isinstance(error, ConnectionError | TimeoutError | OSError)
