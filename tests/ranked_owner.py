"""A process that owns a ranked backend, for tests that kill it: `python -m tests.ranked_owner MODEL LAUNCHER`.

Prints the process ids of its launcher and ranks as JSON once they are ready, then generates for ever.
"""

import json
import sys

from inference.backends.ranked import RankedBackend
from inference.config import DistributedConfig, EngineConfig
from inference.sampling import SamplingParams
from inference.sequence import Sequence


def main(model: str, launcher: str) -> None:
    backend = RankedBackend(
        EngineConfig(
            model=model,
            backend="paged",
            dtype="float32",
            tensor_parallel_size=2,
            distributed=DistributedConfig(launcher=launcher),  # type: ignore[arg-type]
        )
    )
    print(json.dumps([backend.ranks.launcher_pid, *backend.ranks.pids.values()]), flush=True)
    seq_id = 0
    while True:
        if backend.num_unfinished < 4:
            sampling = SamplingParams(max_tokens=100, ignore_eos=True)
            backend.submit([Sequence(seq_id, [5, 6, 7], sampling)])
            seq_id += 1
        backend.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
