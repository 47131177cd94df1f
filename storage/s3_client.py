"""An S3 client that behaves, faults with types, and retries of our own.

boto3's retries are switched off: it does not repeat a 409, and it repeats a conditional write without
telling a lost reply from a lost race. One loop here repeats whatever can pass: 409, 429, 5xx,
timeouts, resets, damaged replies. boto3's transfer manager is not used at all: on big GPU hosts it
switches to CRT by itself, which ignores the endpoint, and it does not check what it downloads.
"""

import base64
import logging
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectionError,  # noqa: A004 (botocore's; the only one meant here)
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
)
from urllib3.exceptions import HTTPError

from storage.checksums import RANGE_ALGORITHMS, SHA256, Checksum
from storage.clock import Clock, SystemClock
from storage.endpoints import check_endpoint, is_aws
from storage.errors import (
    AccessDenied,
    CorruptObject,
    NotFound,
    PreconditionFailed,
    StorageError,
    StoreUnavailable,
    StoreUnfit,
)
from storage.exchanges import bound_exchanges
from storage.object_store import DEFAULT_STORAGE, StorageConfig

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_Result = TypeVar("_Result")

_DAMAGED = (FlexibleChecksumError, ChecksumError)
_CUT_SHORT = (HTTPClientError, ConnectionError, IncompleteReadError, HTTPError)
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504, 507, 509}
_PASSING_CODES = {
    "RequestTimeout",
    "SlowDown",
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_MAX_DAMAGED = 4
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a passing fault is waited out: about 30 s by default, a store's restart."""

    max_attempts: int = 14
    base_s: float = 0.1
    cap_s: float = 5.0

    stall_s: float = 60.0
    """A body of which 2 MiB take longer is cut off and asked for again."""

    patience_s: float = 150.0
    """Nothing is tried again once so long has passed without anything done."""

    def delay_s(self, attempt: int) -> float:
        """Exponential with jitter, so that many replicas do not come back at once."""
        return min(self.cap_s, self.base_s * 2.0**attempt) * random.uniform(0.5, 1.0)


class Again(Exception):
    """Raised inside a request that must be repeated; `fault` is raised when that does not help."""

    def __init__(self, fault: StorageError) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Caller:
    """Runs requests, repeating those whose fault may pass, and raises storage errors only."""

    def __init__(self, retry: RetryPolicy | None = None, clock: Clock | None = None) -> None:
        self._retry = retry or RetryPolicy()
        self._clock = clock or SystemClock()

    @property
    def stall_s(self) -> float:
        """How long a piece of a body may take; see `storage.stalls`."""
        return self._retry.stall_s

    def __call__(self, what: str, request: Callable[[], _Result]) -> _Result:
        """Run a request that is safe to repeat; `what` names it in errors.

        Raises:
            StorageError: typed; StoreUnavailable or CorruptObject once the attempts are used up.
        """
        attempt = num_damaged = 0
        began = self._clock.monotonic()
        while True:
            try:
                return request()
            except (Again, ClientError, BotoCoreError, HTTPError) as error:
                attempt += 1
                fault = as_storage_error(error, what)
                is_damaged = isinstance(fault, CorruptObject)
                num_damaged += is_damaged
                is_hopeless = not is_damaged and not fault.retryable
                if (
                    is_hopeless
                    or attempt >= self._retry.max_attempts
                    or num_damaged >= _MAX_DAMAGED
                    or self._clock.monotonic() - began >= self._retry.patience_s
                ):
                    raise fault from error
            self._clock.sleep(self._retry.delay_s(attempt - 1))


def make_client(
    config: StorageConfig = DEFAULT_STORAGE,
    *,
    max_pool_connections: int = 32,
    read_timeout_s: float = 60.0,
) -> "S3Client":
    """Return a client for the configured endpoint; it never retries by itself (see `Caller`).

    Args:
        read_timeout_s: How long a store may be silent, and a reply take to come (see `storage.exchanges`).

    Raises:
        BadInput: the endpoint is not one that a job may name on this machine.
        StorageError: the profile does not exist or the endpoint is no URL.
    """
    _hush()
    try:
        core = botocore.session.Session(profile=config.profile)
        ambient = _ambient_endpoint(core)
        endpoint = config.endpoint_url or ambient
        if config.endpoint_url is not None and config.endpoint_url != ambient:
            check_endpoint(config.endpoint_url)
        foreign = endpoint is not None and not is_aws(endpoint)
        if foreign:
            # As AWS_EC2_METADATA_DISABLED: another store would not know this machine's role, and asking costs seconds.
            core.get_component("credential_provider").remove("iam-role")
        region = config.region or core.get_config_variable("region") or "us-east-1"
        client = boto3.session.Session(botocore_session=core, region_name=region).client(
            "s3",
            endpoint_url=endpoint,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": 1},
                s3={"addressing_style": "path" if foreign else "auto"},
                connect_timeout=5,
                read_timeout=read_timeout_s,
                max_pool_connections=max_pool_connections,
                tcp_keepalive=True,
            ),
        )
        if foreign:
            client.meta.events.register("before-call.s3.HeadBucket", _ask_once)
        client.meta.events.register("before-parse.s3", _refuse_cut_reply)
        bound_exchanges(client, read_timeout_s)
        return client
    except (BotoCoreError, ValueError) as error:
        raise StorageError(f"no S3 client: {error}; check the storage settings") from error


def _ask_once(params: dict[str, Any], **_: object) -> None:
    """Mark botocore's question for a bucket's region, asked when a store redirects a request.

    Otherwise a store that redirects that one too is asked until the stack is full.
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _refuse_cut_reply(operation_model: Any, response_dict: Any, **_: Any) -> None:
    """Refuse a reply whose body is shorter than announced: botocore takes an empty one for an empty listing.

    Bodies that are streamed are counted by whoever reads them.
    """
    body, announced = response_dict["body"], response_dict["headers"].get("content-length")
    if announced is None or not isinstance(body, bytes) or operation_model.name.startswith("Head"):
        return
    if len(body) != int(announced):
        fault = f"{operation_model.name}: {len(body)} of {announced} bytes of the reply came"
        raise HTTPClientError(error=fault)


def as_storage_error(error: Exception, what: str) -> StorageError:
    """Turn whatever boto3 raised into what it means here."""
    if isinstance(error, Again):
        return error.fault
    if isinstance(error, ClientError):
        return _from_reply(error, what)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDenied(f"{what}: {error}; set AWS_ACCESS_KEY_ID or storage.profile")
    if isinstance(error, _DAMAGED):
        return CorruptObject(f"{what}: {error}; the bytes are not what the store promised")
    if isinstance(error, _CUT_SHORT):
        return StoreUnavailable(f"{what}: {error}; is the store up and reachable?")
    return StorageError(f"{what}: {error}")


def _from_reply(error: ClientError, what: str) -> StorageError:
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    fact = f"{what}: {status} {code}"
    if code == "NoSuchBucket":
        return NotFound(f"{fact}: the bucket does not exist; create it or correct the URI")
    if code == "RequestTimeTooSkewed":
        return AccessDenied(f"{fact}: this machine's clock is wrong; set it")
    if status in {401, 403} or code in _DENIED_CODES:
        return AccessDenied(f"{fact}; check the credentials and the bucket's policy")
    if status == 404:
        return NotFound(f"{what}: no such object")
    if status == 412:
        return PreconditionFailed(f"{fact}: the object is another one now")
    if status == 501:
        return StoreUnfit(f"{fact}: the store lacks this operation; use another store")
    if status in _PASSING_STATUS or code in _PASSING_CODES:
        return StoreUnavailable(f"{fact}; is the store healthy?")
    return StorageError(f"{fact}: {error.response.get('Error', {}).get('Message', '')}")


def full_checksum(reply: Any, algorithm: str = "crc64nvme") -> str | None:
    """Return the checksum of the whole object, where a GET or HEAD tells it."""
    value: str | None = reply.get(f"Checksum{algorithm.upper()}")
    # One made of the parts' checksums, "...-N", says nothing of our ranges; older stores name no type.
    if not value or "-" in value or reply.get("ChecksumType") == "COMPOSITE":
        return None
    return value


def promised_checksum(reply: Any) -> Checksum | None:
    """Return the checksum of the whole object that costs least to compare, where a HEAD tells one."""
    for algorithm in RANGE_ALGORITHMS:
        if value := full_checksum(reply, algorithm):
            return Checksum(algorithm, value)
    if value := full_checksum(reply, SHA256):
        with suppress(ValueError):  # no base64: the store tells none
            return Checksum(SHA256, base64.b64decode(value, validate=True).hex())
    return None


def status_of(error: ClientError) -> int:
    """The HTTP status of a refused request."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _ambient_endpoint(core: botocore.session.Session) -> str | None:
    """The endpoint that the usual AWS environment or the profile names."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return os.environ[name]
    found = core.get_scoped_config().get("endpoint_url")
    return str(found) if found else None


def _hush() -> None:
    """Keep botocore's debug messages off, whatever the root logger's level: they hold bodies and tokens."""
    logger = logging.getLogger("botocore")
    logger.setLevel(max(logger.level, logging.WARNING))
