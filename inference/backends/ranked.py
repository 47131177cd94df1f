"""RankedBackend: a backend whose engine runs in several rank processes, one a device.

It lives in the replica's process, which has no device of its own: it starts the ranks, hands sequences to the
first one and takes completions back. A rank that dies ends them all with an error that another attempt can
help, within seconds; nothing waits for it.

The ranks start as soon as the model's small files are here, and read each weight file once it is verified: which
ones are is told to them (`inference.rank_files`). If staging fails, they end, and its error is this backend's.

A rank that is out of memory is in the middle of a step that the others cannot take back. So all shrink together:
they are started again with less (`inference.backends.shrinking`), and what is unfinished is given to them anew.
Over several hosts each starts its own (`tasks.follow`), and they meet where they met before.
"""

import dataclasses
import time
from collections.abc import Iterable

from inference.arriving import Arriving
from inference.backends import check_engine
from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequences
from inference.backends.shrinking import Shrinking, failed_alone
from inference.config import EngineConfig
from inference.errors import EngineConfigError, EngineFault, OutOfMemory
from inference.heads import check_heads
from inference.launch import Launch
from inference.model_config import read_model_shape
from inference.rank_files import FileNews, no_more
from inference.rank_group import RankGroup
from inference.rank_messages import (
    Message,
    completion_from_json,
    info_from_json,
    sequence_to_json,
    update_stats,
)
from inference.sequence import Completion, Sequence
from inference.weights import SmallFiles, check_model_folder, check_small_files
from inference.zero import check_zero

_STEP_S = 0.05
_LOAD_POLL_S = 0.5
_ARRIVAL_POLL_S = 0.05


class RankedBackend:
    """See `inference.backends.base.Backend` for the protocol."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        arriving: Arriving | None = None,
        module: str = "inference",
    ) -> None:
        """Check, start the ranks, and wait until they are ready.

        Args:
            config: what to build.
            arriving: the model's files, some of which may still be on their way, to ranks of this host
                alone; default: all are in the folder `config.model`.
            module: what each rank runs; another one must keep to what `inference.__main__` promises.

        Raises:
            ModelError: the model folder is unusable; or the error of who fills it.
            EngineConfigError: the settings cannot work on this model or machine; said before anything is started.
            EngineFault: a rank ended while it loaded.
            OutOfMemory: a device is full before the first step, even after shrinking.
        """
        started_at = time.perf_counter()
        self._files = arriving or Arriving.whole(
            check_model_folder(config.model, config.allowed_code).path
        )
        check_ranks(check_small_files(self._files.folder(), config.allowed_code), config)
        self._shrinking = Shrinking(config)
        self._module = module
        self._stats = EngineStats()
        self._stats_before = EngineStats()
        self._unfinished: dict[int, Sequence] = {}
        self._num_submitted = self._num_received = self._reported_waiting = 0
        self._heard_at = time.monotonic()
        self._silence_s = config.distributed.timeout_s + 60
        self._group: RankGroup | None = None
        self._built: BackendInfo | None = None
        info = self._started()
        elapsed_s = time.perf_counter() - started_at
        self._built = dataclasses.replace(
            info,
            num_ranks=config.tensor_parallel_size,
            load_s=max(info.load_s, elapsed_s - info.warmup_s),
        )

    @property
    def info(self) -> BackendInfo:
        """What the first rank built; memory is one rank's."""
        assert self._built is not None, "asked while the ranks start"
        return self._built

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
        accepted = check_sequences(sequences, self._unfinished, self.info.max_model_len)
        if not accepted:
            return
        if not self._unfinished:
            self._heard_at = time.monotonic()  # they were idle, not silent
        self._unfinished.update({sequence.seq_id: sequence for sequence in accepted})
        self._send(accepted)

    def step(self) -> list[Completion]:
        """Return what the ranks have finished, after a short wait if nothing has come.

        Raises:
            EngineFault: a rank is gone, or none has been heard of for longer than any step may take.
            OutOfMemory: a device is full even after shrinking.
        """
        finished: list[Completion] = []
        try:
            messages = self.ranks.take(_STEP_S)
        except OutOfMemory as error:
            return self._shrink(error)
        for message in messages:
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

    def _start(self) -> BackendInfo:
        """Start the ranks and wait until they are ready."""
        config = self._shrinking.config
        self._group = RankGroup(
            Launch(
                module=self._module,
                num_ranks=config.tensor_parallel_size // config.distributed.num_hosts,
                distributed=config.distributed,
                is_again=self._shrinking.num_shrinks > 0,
            ),
            dataclasses.asdict(config),
        )
        return self._wait_until_ready(self._group)

    def _send(self, sequences: Iterable[Sequence]) -> None:
        values = [sequence_to_json(sequence) for sequence in sequences]
        self.ranks.send({"kind": "submit", "sequences": values})
        self._num_submitted += len(values)

    def _shrink(self, error: OutOfMemory) -> list[Completion]:
        """Start all ranks again, smaller, and give them what is unfinished; return what has failed.

        Raises:
            OutOfMemory: as `_make_smaller`.
        """
        failed = self._make_smaller(error)
        self._stats_before = dataclasses.replace(self._stats)
        self._num_submitted = self._num_received = self._reported_waiting = 0
        info = self._started()
        self._built = dataclasses.replace(self.info, memory=info.memory)
        self._heard_at = time.monotonic()
        self._send(self._unfinished.values())
        return failed

    def _started(self) -> BackendInfo:
        """Start the ranks, smaller each time one is out of memory. Raises as `_make_smaller`."""
        while True:
            try:
                return self._start()
            except OutOfMemory as error:
                self._make_smaller(error)

    def _make_smaller(self, error: OutOfMemory) -> list[Completion]:
        """End the ranks; those that follow need less memory. Return what has failed: a sequence too large alone.

        Raises:
            OutOfMemory: as `Shrinking.shrink`.
        """
        too_large = self._shrinking.shrink(error, self._built)
        self.ranks.close()
        return [] if too_large is None else [failed_alone(self._unfinished.pop(too_large))]

    def _take_in(self, message: Message) -> list[Completion]:
        update_stats(self._stats, message["stats"], self._stats_before)
        self._reported_waiting = message["num_waiting"]
        self._num_received = message["num_received"]
        completions = [completion_from_json(values) for values in message["completions"]]
        for completion in completions:
            del self._unfinished[completion.seq_id]
        return completions

    def _wait_until_ready(self, group: RankGroup) -> BackendInfo:
        news = FileNews(self._files)
        try:
            while True:
                self._tell_files(group, news)
                for message in group.take(_LOAD_POLL_S if news.is_over else _ARRIVAL_POLL_S):
                    if message["kind"] == "ready":
                        self._files.waited_s += message["waited_s"]
                        return info_from_json(message["info"])
        except BaseException:
            group.close()
            raise

    def _tell_files(self, group: RankGroup, news: FileNews) -> None:
        """Tell the ranks what may be read by now; end them if no more will come. Raises the filler's error."""
        try:
            messages = news.since_last()
        except BaseException as error:
            group.dismiss(no_more(error))
            raise
        for message in messages:
            group.tell(message)


def check_ranks(folder: SmallFiles, config: EngineConfig) -> None:
    """Say what cannot work before any process is started.

    Raises:
        ModelError: the model's config cannot be read.
        EngineConfigError: heads that do not divide, or fewer devices than ranks, with the numbers.
    """
    import torch  # heavy, and only to count devices

    size = config.tensor_parallel_size
    if config.backend == "zero":
        check_zero(folder, config)
    else:
        shape = read_model_shape(folder.path)
        check_heads(
            size, num_heads=shape.num_attention_heads, num_kv_heads=shape.num_key_value_heads
        )
        check_engine(folder, dataclasses.replace(config, backend="paged"))
    here = size // config.distributed.num_hosts
    if torch.cuda.is_available() and torch.cuda.device_count() < here:
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {size}: needs {here} devices on this host, "
            f"{torch.cuda.device_count()} are visible"
        )
