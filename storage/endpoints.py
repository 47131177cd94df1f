"""Which S3 endpoints a job may name: rows and credentials go only where the machine's owner lets them.

An endpoint from the machine's own environment or AWS profile is its owner's choice and is used as it is.
One from a job file is checked, because whoever writes job files need not own the machine:

    NIGHTJAR_ENDPOINTS set      it must be among them (URLs separated by commas or spaces), or be AWS
    not set                     https anywhere, http on loopback only
    always                      no metadata or other link-local address, no user or password in the URL
"""

import ipaddress
import os
from urllib.parse import SplitResult, urlsplit

from storage.errors import BadInput

ENDPOINTS_VARIABLE = "NIGHTJAR_ENDPOINTS"
"""Environment variable: the endpoints that job files may name."""

_METADATA_HOSTS = {"metadata", "metadata.google.internal", "instance-data"}
_METADATA_ADDRESSES = {
    ipaddress.ip_address("fd00:ec2::254"),
    ipaddress.ip_address("100.100.100.200"),
}


def check_endpoint(url: str) -> None:
    """Refuse an endpoint that a job file must not name.

    Raises:
        BadInput: not a plain http(s) URL, or not allowed here; the message never holds a password.
    """
    refuse_password(url)
    parts = _split(url)
    shown = _shown(parts)
    if parts.query or parts.fragment:
        raise BadInput(f"storage.endpoint_url {shown}: has a query; give scheme, host and port")
    if _is_metadata(parts.hostname or ""):
        raise BadInput(
            f"storage.endpoint_url {shown}: a link-local or metadata address is never a store"
        )
    named = os.environ.get(ENDPOINTS_VARIABLE)
    if named is not None:
        allowed = {_origin(_split(item)) for item in named.replace(",", " ").split()}
        if _origin(parts) not in allowed and not (parts.scheme == "https" and is_aws(url)):
            raise BadInput(
                f"storage.endpoint_url {shown}: not among the endpoints allowed here "
                f"({ENDPOINTS_VARIABLE}); ask the machine's owner to add it"
            )
    elif parts.scheme != "https" and not _is_loopback(parts.hostname or ""):
        raise BadInput(
            f"storage.endpoint_url {shown}: rows would travel unencrypted; use https, or name it in "
            f"{ENDPOINTS_VARIABLE} or AWS_ENDPOINT_URL on this machine"
        )


def refuse_password(url: str) -> None:
    """Refuse an endpoint with credentials in it, before it is recorded anywhere.

    Raises:
        BadInput: no http(s) URL, or one with a user or password; the message does not hold them.
    """
    parts = _split(url)
    if parts.username is not None or parts.password is not None:
        raise BadInput(
            f"storage.endpoint_url {_shown(parts)}: has a user or password in it, which would be "
            "recorded; use the AWS environment or storage.profile"
        )


def is_aws(endpoint: str) -> bool:
    """Whether the host is one of Amazon's own."""
    host = urlsplit(endpoint).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises when it is no number)
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(
            "storage.endpoint_url is not an http or https URL; write it as https://host:port"
        )
    return parts


def _origin(parts: SplitResult) -> tuple[str, str, int]:
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, (parts.hostname or "").rstrip("."), port


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        # Only an IPv6 address has a zone behind a percent sign; elsewhere that is a name.
        found = ipaddress.ip_address(host.partition("%")[0] if ":" in host else host)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _is_metadata(host: str) -> bool:
    found = _address(host)
    if found is None:
        return host.rstrip(".").lower() in _METADATA_HOSTS
    return found.is_link_local or found in _METADATA_ADDRESSES


def _is_loopback(host: str) -> bool:
    found = _address(host)
    return host.lower() == "localhost" if found is None else found.is_loopback
