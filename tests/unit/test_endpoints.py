"""A job file cannot send rows or signed requests wherever it likes."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from storage.endpoints import ENDPOINTS_VARIABLE, check_endpoint
from storage.errors import BadInput, StorageError
from storage.object_store import StorageConfig
from storage.s3_client import RetryPolicy, make_client
from storage.s3_store import S3Store


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINTS_VARIABLE, "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")


@pytest.mark.parametrize(
    "url",
    [
        "https://s3.example.org",
        "https://s3.eu-central-1.amazonaws.com",
        "http://127.0.0.1:8333",
        "http://localhost:8333",
        "http://[::1]:8333",
    ],
)
def test_encrypted_endpoints_and_loopback_are_allowed(url: str) -> None:
    check_endpoint(url)
    assert make_client(StorageConfig(endpoint_url=url)).meta.endpoint_url == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://s3.example.org", "unencrypted"),
        ("http://localhost.example.org", "unencrypted"),
        ("http://2130706433", "unencrypted"),  # 127.0.0.1, spelt to be overlooked
        ("http://127.0.0.1%25.example.org", "unencrypted"),
        ("http://169.254.169.254", "metadata"),
        ("https://169.254.169.254", "metadata"),
        ("http://[::ffff:169.254.169.254]/", "metadata"),
        ("http://[fe80::1%25eth0]/", "metadata"),
        ("http://[fd00:ec2::254]", "metadata"),
        ("https://metadata.google.internal.", "metadata"),
        ("https://100.100.100.200", "metadata"),
        ("https://me:swordfish@s3.example.org", "user or password"),
        ("https://s3.example.org/?a=b", "query"),
        ("ftp://s3.example.org", "not an http or https URL"),
        ("file:///etc/passwd", "not an http or https URL"),
        ("https://s3.example.org:port", "not an http or https URL"),
        ("https://[broken", "not an http or https URL"),
        ("s3.example.org", "not an http or https URL"),
    ],
)
def test_other_endpoints_are_refused_in_one_line_without_their_password(
    url: str, said: str
) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        make_client(StorageConfig(endpoint_url=url))
    assert "swordfish" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_owner_of_the_machine_says_which_endpoints_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENDPOINTS_VARIABLE, "http://store:8333, https://s3.example.org")
    for url in ("http://store:8333/", "https://s3.example.org:443", "https://s3.amazonaws.com"):
        check_endpoint(url)
    for url in (
        "http://store",
        "https://store:8333",
        "http://127.0.0.1:8333",
        "https://s3.example.com",
        "http://s3.amazonaws.com",
    ):
        with pytest.raises(BadInput, match=ENDPOINTS_VARIABLE):
            check_endpoint(url)


def test_the_owner_s_own_endpoint_needs_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:8333")
    assert make_client().meta.endpoint_url == "http://store:8333"
    config = StorageConfig(endpoint_url="http://store:8333")
    assert make_client(config).meta.endpoint_url == "http://store:8333"


class _Recorder(http.server.BaseHTTPRequestHandler):
    """Counts requests; sends them elsewhere when told to."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        target = self.server.target  # type: ignore[attr-defined]
        self.send_response(307 if target else 200)
        if target:
            self.send_header("Location", target + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def server(target: str = "") -> Iterator[http.server.ThreadingHTTPServer]:
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Recorder)
    found.seen, found.target = [], target  # type: ignore[attr-defined]
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def test_a_store_cannot_send_a_request_on_to_another_address() -> None:
    with server() as other, server(f"http://127.0.0.1:{other.server_port}") as store:
        config = StorageConfig(endpoint_url=f"http://127.0.0.1:{store.server_port}")
        opened = S3Store("s3://bucket/run", config, retry=RetryPolicy(max_attempts=1))
        for request in (lambda: opened.get("k"), lambda: opened.put("k", b"row")):
            with pytest.raises(StorageError):
                request()
        opened._client.close()
    assert store.seen  # type: ignore[attr-defined]
    assert other.seen == []  # type: ignore[attr-defined]
