"""RankedBackend: a backend whose engine runs in several rank processes, one a device.

It lives in the replica's process, which has no device of its own: it starts the ranks, hands sequences to the
first one and takes completions back. A rank that dies ends them all with an error that another attempt can
help, within seconds; nothing waits for it.
"""

import dataclasses
import time
from collections.abc import Iterable

from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequences
from inference.config import EngineConfig
from inference.errors import EngineConfigError, EngineFault
from inference.heads import check_heads
from inference.launch import Launch
from inference.model_config import read_model_shape
from inference.quantization import check_quantization
from inference.rank_group import RankGroup
from inference.rank_messages import (
    Message,
    completion_from_json,
    info_from_json,
    sequence_to_json,
    update_stats,
)
from inference.sequence import Completion, Sequence
from inference.weights import check_model_folder
from inference.zero import check_zero

_STEP_S = 0.05
_LOAD_POLL_S = 0.5


class RankedBackend:
    """See `inference.backends.base.Backend` for the protocol."""

    def __init__(self, config: EngineConfig, *, module: str = "inference") -> None:
        """Check, start the ranks, and wait until they are ready.

        Args:
            config: what to build.
            module: what each rank runs; another one must keep to what `inference.__main__` promises.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine; said before anything is started.
            EngineFault: a rank ended while it loaded.
        """
        started_at = time.perf_counter()
        check_ranks(config)
        distributed = config.distributed
        self._stats = EngineStats()
        self._unfinished: set[int] = set()
        self._num_submitted = self._num_received = self._reported_waiting = 0
        self._heard_at = time.monotonic()
        self._silence_s = distributed.timeout_s + 60
        self._group: RankGroup | None = RankGroup(
            Launch(
                module=module,
                num_ranks=config.tensor_parallel_size // distributed.num_hosts,
                distributed=distributed,
            ),
            dataclasses.asdict(config),
        )
        info = self._wait_until_ready(self._group)
        elapsed_s = time.perf_counter() - started_at
        self._info = dataclasses.replace(
            info,
            num_ranks=config.tensor_parallel_size,
            load_s=max(info.load_s, elapsed_s - info.warmup_s),
        )

    @property
    def info(self) -> BackendInfo:
        """What the first rank built; memory is one rank's."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The first rank's totals so far; the same object, updated in place."""
        return self._stats

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""
        return len(self._unfinished)

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started, as far as is known here."""
        on_their_way = self._num_submitted - self._num_received
        return min(len(self._unfinished), self._reported_waiting + on_their_way)

    @property
    def ranks(self) -> RankGroup:
        """The rank processes. Raises EngineFault once closed."""
        if self._group is None:
            raise EngineFault("the backend is closed; build another one")
        return self._group

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; see `inference.backends.checks.check_sequence` for what is refused."""
        accepted = check_sequences(sequences, self._unfinished, self._info.max_model_len)
        if not accepted:
            return
        self.ranks.send({"kind": "submit", "sequences": [sequence_to_json(s) for s in accepted]})
        if not self._unfinished:
            self._heard_at = time.monotonic()  # they were idle, not silent
        self._unfinished.update(sequence.seq_id for sequence in accepted)
        self._num_submitted += len(accepted)

    def step(self) -> list[Completion]:
        """Return what the ranks have finished, after a short wait if nothing has come.

        Raises:
            EngineFault: a rank is gone, or none has been heard of for longer than any step may take.
            OutOfMemory: a device is full.
        """
        finished: list[Completion] = []
        for message in self.ranks.take(_STEP_S):
            self._heard_at = time.monotonic()
            if message["kind"] == "progress":
                finished += self._take_in(message)
        silent_s = time.monotonic() - self._heard_at
        if self._unfinished and silent_s > self._silence_s:
            self.close()
            raise EngineFault(
                f"the ranks have said nothing for {silent_s:.0f} s, longer than "
                f"engine.distributed.timeout_s allows; all ranks were stopped"
            )
        return finished

    def close(self) -> None:
        """End the ranks; the backend is unusable afterwards. Safe to repeat."""
        if self._group is not None:
            self._group.close()
            self._group = None
            self._unfinished.clear()

    def _take_in(self, message: Message) -> list[Completion]:
        update_stats(self._stats, message["stats"])
        self._reported_waiting = message["num_waiting"]
        self._num_received = message["num_received"]
        completions = [completion_from_json(values) for values in message["completions"]]
        self._unfinished.difference_update(c.seq_id for c in completions)
        return completions

    def _wait_until_ready(self, group: RankGroup) -> BackendInfo:
        try:
            while True:
                for message in group.take(_LOAD_POLL_S):
                    if message["kind"] == "ready":
                        return info_from_json(message["info"])
        except BaseException:
            group.close()
            raise


def check_ranks(config: EngineConfig) -> None:
    """Say what cannot work before any process is started.

    Raises:
        ModelError: the model folder is unusable.
        EngineConfigError: heads that do not divide, or fewer devices than ranks, with the numbers.
    """
    import torch  # heavy, and only to count devices

    folder = check_model_folder(config.model)
    size = config.tensor_parallel_size
    if config.backend == "zero":
        check_zero(folder, config)
    else:
        shape = read_model_shape(folder.path)
        check_heads(
            size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads
        )
        check_quantization(folder, config, "paged")
    here = size // config.distributed.num_hosts
    if torch.cuda.is_available() and torch.cuda.device_count() < here:
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {size}: needs {here} devices on this host, "
            f"{torch.cuda.device_count()} are visible"
        )
