"""A process that owns a ranked backend, for tests that kill it: `python -m tests.ranked_owner CONFIG [MODULE]`.

CONFIG is an engine's configuration as JSON, MODULE what its ranks run. Prints the process ids of its launcher and ranks once they are ready,
then what eight prompts give, then generates until it is stopped or a rank is lost.
"""

import json
import sys

from inference.backends.ranked import RankedBackend
from inference.config import config_from_json
from inference.errors import InferenceError
from inference.sampling import SamplingParams
from inference.sequence import Sequence


def prompts() -> list[Sequence]:
    sampling = SamplingParams(max_tokens=20, temperature=0.7)
    return [Sequence(i, [5, 6, 7 + i], sampling, draw_seed=i) for i in range(8)]


def main(config: str, module: str = "inference") -> None:
    backend = RankedBackend(config_from_json(json.loads(config)), module=module)
    print(json.dumps([backend.ranks.launcher_pid, *backend.ranks.pids.values()]), flush=True)
    backend.submit(prompts())
    found = {}
    while backend.num_unfinished:
        found.update({c.seq_id: c.token_ids for c in backend.step()})
    print(json.dumps([found[i] for i in range(8)]), flush=True)
    seq_id = 8
    while True:
        if backend.num_unfinished < 4:
            sampling = SamplingParams(max_tokens=100, ignore_eos=True)
            backend.submit([Sequence(seq_id, [5, 6, 7], sampling)])
            seq_id += 1
        backend.step()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except InferenceError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
