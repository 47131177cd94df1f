"""One rank of a replica of which one has little memory: `python -m tests.small_rank`, under a launcher.

As `python -m inference`, but for rank NIGHTJAR_TEST_SMALL_RANK, 1 unless set, which runs out of memory in steps of more
than NIGHTJAR_TEST_MOST_TOKENS (with NIGHTJAR_TEST_WARM_UP while it is warmed up for them), or of a static batch of more
than NIGHTJAR_TEST_MOST_ROWS, or with a prompt of NIGHTJAR_TEST_FULL_AT tokens.
"""

import os
import sys
from typing import Any

import torch

import inference.__main__ as rank_process
from inference.backends.static_batch import StaticBatch
from inference.backends.zero import ZeroBackend
from inference.model_runner import ModelRunner


def shrink_memory_before_the_first_step(most: int) -> None:
    warm_up = ModelRunner.warm_up

    def small_warm_up(runner: ModelRunner, *args: Any, **kwargs: Any) -> None:
        if runner._limits.max_num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        warm_up(runner, *args, **kwargs)

    ModelRunner.warm_up = small_warm_up  # type: ignore[method-assign]


def shrink_memory(most: int) -> None:
    launch = ModelRunner.launch

    def small_launch(runner: ModelRunner, step: Any) -> Any:
        num_tokens = len(step.decodes) + sum(chunk.num_tokens for chunk in step.chunks)
        if num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return launch(runner, step)

    ModelRunner.launch = small_launch  # type: ignore[method-assign]


def shrink_batches(most: int, full_at: int) -> None:
    forward = ZeroBackend._forward

    def small_forward(backend: ZeroBackend, batch: StaticBatch) -> Any:
        prompts = [len(row.sequence.prompt_token_ids) for row in batch.rows]
        if len(prompts) > most or full_at in prompts:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(backend, batch)

    ZeroBackend._forward = small_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ.get("NIGHTJAR_TEST_SMALL_RANK", "1"):
        most_tokens = int(os.environ.get("NIGHTJAR_TEST_MOST_TOKENS", "1000000"))
        if "NIGHTJAR_TEST_WARM_UP" in os.environ:
            shrink_memory_before_the_first_step(most_tokens)
        else:
            shrink_memory(most_tokens)
        shrink_batches(
            int(os.environ.get("NIGHTJAR_TEST_MOST_ROWS", "1000000")),
            int(os.environ.get("NIGHTJAR_TEST_FULL_AT", "-1")),
        )
    exit_code = rank_process.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
