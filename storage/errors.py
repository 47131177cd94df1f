"""What can go wrong with stored bytes, and whether another attempt can help.

StorageError
|-- NotFound              no object under that key                              (fatal)
|-- AlreadyExists         a create-only key is taken                            (an answer, not a fault)
|-- PreconditionFailed    the object is not the one the caller saw              (an answer, not a fault)
|-- AccessDenied          credentials or policy refuse                          (fatal)
|-- StoreUnavailable      5xx, timeouts, resets, after our own retries          (retryable)
|-- StoreUnfit            the store lacks what the protocol needs               (fatal)
|-- CorruptObject         digest, size or footer is not what was promised       (fatal)
|-- InputChanged          an input file is not the one that was planned         (fatal)
|-- BadInput              the input cannot be used; names file and place        (fatal)
|-- FingerprintMismatch   the run folder belongs to other settings              (fatal)
|-- LeaseLost             somebody else holds the shard now                     (an answer, not a fault)
`-- NoSpace               a disk is full: path, needed, free                    (fatal)
"""

from typing import ClassVar


class StorageError(Exception):
    """Anything the storage room raises on purpose."""

    retryable: ClassVar[bool] = False


class NotFound(StorageError):
    """There is no object under that key."""


class AlreadyExists(StorageError):
    """A create-only key is taken by somebody else's object."""


class PreconditionFailed(StorageError):
    """The object's ETag is not the one the caller named."""


class AccessDenied(StorageError):
    """Credentials are missing or wrong, or a policy refuses."""


class StoreUnavailable(StorageError):
    """The store did not answer properly, even after bounded retries."""

    retryable: ClassVar[bool] = True


class StoreUnfit(StorageError):
    """The store does not honour conditional writes, so exactly-once cannot be kept there."""


class CorruptObject(StorageError):
    """Stored bytes are not what their digest, size or footer promises."""


class InputChanged(StorageError):
    """An input file is no longer the one that was planned; the message has old and new ETag."""


class BadInput(StorageError):
    """The input cannot be used; the message names the file, the place and what to change."""


class FingerprintMismatch(StorageError):
    """The run folder belongs to other settings; the message names the fields that differ."""


class LeaseLost(StorageError):
    """Somebody else holds the shard now; this attempt's output is left uncommitted."""


class NoSpace(StorageError):
    """A disk is full; the message has the path, the bytes needed and the bytes free."""
