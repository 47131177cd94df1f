"""The flow `stage-weights`: weights to a node's fastest disk before the night, so that no GPU waits."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed

from flows.stopping import stop_on_sigterm
from flows.task_runs import as_state
from storage.object_store import StorageConfig
from storage.sizes import parse_bytes
from tasks.stage import describe, stage


@flow(name="stage-weights", persist_result=False)
def stage_weights(
    source: str,
    stage_to: str = "auto",
    endpoint_url: str | None = None,
    stage_budget: str | None = None,
    allowed_code: list[str] | None = None,
) -> Any:
    """Stage a model on the node this runs on; a model that is there already is only checked.

    Args:
        source: A folder, `s3://bucket/prefix/`, `hf://org/repo@revision` or a GGUF file.
        stage_to: auto, shm, nvme or a folder.
        endpoint_url: S3 endpoint for stores that are not AWS.
        stage_budget: Most bytes that staged models may take there, such as `200GB`.
        allowed_code: SHA-256 of config files that may name code; see `model.allowed_code` of a job.

    Returns:
        A state whose message says what was staged where, and how fast.
    """

    def work() -> str:
        staged = stage(
            source,
            storage=StorageConfig(endpoint_url=endpoint_url),
            stage_to=stage_to,
            budget_bytes=parse_bytes(stage_budget, name="stage_budget"),
            allowed_code=allowed_code or (),
        )
        staged.close()
        return describe(staged.report)

    def said(text: str) -> State[Any]:
        return Completed(message=text)

    with stop_on_sigterm():
        return as_state(work, said)
