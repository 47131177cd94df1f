"""Encryption at the store: what is asked for with each object written, and whether it was done."""

from collections.abc import Mapping
from typing import Any

from storage.errors import StoreUnfit
from storage.object_store import StorageConfig


def asked_of(config: StorageConfig) -> dict[str, Any]:
    """Return how every object is to be encrypted, as boto3 spells it; empty: as the bucket does."""
    asked = {
        "ServerSideEncryption": config.server_side_encryption,
        "SSEKMSKeyId": config.kms_key_id,
    }
    return {name: value for name, value in asked.items() if value is not None}


def require(asked: Mapping[str, Any], reply: Mapping[str, Any], what: str) -> None:
    """Refuse a store that keeps what it was asked to encrypt as it is, without a word.

    Raises:
        StoreUnfit: the reply to a write tells another encryption than was asked for.
    """
    kind = asked.get("ServerSideEncryption")
    if kind is not None and reply.get("ServerSideEncryption") != kind:
        raise StoreUnfit(
            f"{what}: the store did not encrypt it ({kind} was asked for); use another store, or "
            "leave out storage.server_side_encryption"
        )
