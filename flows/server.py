"""The Prefect server that is configured: whether it answers, before anything is asked of it."""

import os
import re

from flows.job_checks import JobError

_USER_INFO = re.compile(r"//[^/@]*@")


def check_server() -> None:
    """Refuse a server that is not there.

    Raises:
        JobError: with its address and what to do.
    """
    from prefect import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        url = _USER_INFO.sub("//", os.environ.get("PREFECT_API_URL", ""))
        raise JobError(
            f"PREFECT_API_URL is {url}: no Prefect server answers there ({type(error).__name__}); start it "
            "with `prefect server start`, or unset the variable to run without one"
        )
