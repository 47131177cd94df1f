"""One rank of a replica whose second rank has little memory: `python -m tests.small_rank`, under a launcher.

As `python -m inference`, but for rank 1, which runs out of memory in steps of more than NIGHTJAR_TEST_MOST_TOKENS.
"""

import os
import sys
from typing import Any

import torch

import inference.__main__ as rank_process
from inference.model_runner import ModelRunner


def shrink_memory(most: int) -> None:
    launch = ModelRunner.launch

    def small_launch(runner: ModelRunner, step: Any) -> Any:
        num_tokens = len(step.decodes) + sum(chunk.num_tokens for chunk in step.chunks)
        if num_tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return launch(runner, step)

    ModelRunner.launch = small_launch  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        shrink_memory(int(os.environ["NIGHTJAR_TEST_MOST_TOKENS"]))
    exit_code = rank_process.main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
