"""PagedBackend: continuous batching over a paged KV cache. The default on CUDA; runs on the CPU too."""

import gc
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from inference.arriving import Arriving
from inference.backends import check_engine
from inference.backends.base import BackendInfo, EngineStats
from inference.backends.checks import check_sequences
from inference.backends.row import RowMaker
from inference.build_engine import build_engine
from inference.config import EngineConfig
from inference.end_tokens import end_token_ids
from inference.engine import PagedEngine
from inference.errors import EngineConfigError, EngineFault, OutOfMemory
from inference.kernels import plain
from inference.loading import dtype_name, expect_weights, load_arriving, load_tokenizer
from inference.memory import MemoryPlan, first_line, is_out_of_memory
from inference.model import PagedModel, make_paged_model
from inference.model_config import read_model_shape
from inference.paged_settings import PagedSettings
from inference.precompile import Precompile
from inference.sampling_needs import SamplingNeeds
from inference.sequence import Completion, Sequence
from inference.tensor_parallel import TensorParallel
from inference.weights import SmallFiles, check_model_folder, check_small_files
from inference.world import current_device

logger = logging.getLogger(__name__)

_STEPS_A_LOOK = 64
"""Steps between two looks at the device's memory: asking takes a tenth of a millisecond."""


class PagedBackend:
    """See `inference.backends.base.Backend` for the protocol."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        ranks: TensorParallel | None = None,
        arriving: Arriving | None = None,
    ) -> None:
        """Load the model and build the engine; under tensor parallel, this rank's part of both.

        Args:
            config: what to build.
            ranks: the ranks that hold the model between them, each of which builds the same backend and
                gives it the same sequences (`inference.rank_loop`); `RankedBackend` starts them.
            arriving: the model's files, some of which may still be on their way; default: all are
                in the folder `config.model`.

        Raises:
            ModelError: the model folder is unusable; or the error of who fills it.
            EngineConfigError: the settings cannot work on this model or machine.
            OutOfMemory: the device is full before the first step, with all made as small as it can be.
        """
        started_at = time.perf_counter()
        ranks = ranks or TensorParallel.alone()
        if config.tensor_parallel_size != ranks.size:
            raise EngineConfigError(
                f"engine.tensor_parallel_size is {config.tensor_parallel_size}: a paged backend in one "
                f"process is one rank of {ranks.size}; use create_backend, which starts them"
            )
        _check_fp8(config)
        files = arriving or Arriving.whole(
            check_model_folder(config.model, config.allowed_code).path
        )
        folder = check_small_files(files.folder(), config.allowed_code)
        check_engine(folder, replace(config, backend="paged"))
        device = current_device()
        with Precompile.beside(folder.config, config, device) as kernels:
            expect_weights(files, config, device, num_ranks=ranks.size)
            self.tokenizer = load_tokenizer(folder)
            model = _load_model(files, folder, config, ranks, device)
            settings = PagedSettings.of(config, model)
            compile_wait_s = kernels.wait()
        load_s = time.perf_counter() - started_at
        self._engine: PagedEngine | None
        self._engine, plan, warmup_s = build_engine(
            model, settings, lambda sequence: self._make_row(sequence)
        )
        scheduler = self._engine.scheduler
        max_model_len = scheduler.max_model_len
        self._make_row = RowMaker(
            self.tokenizer, end_token_ids(folder.path, self.tokenizer), max_model_len
        )
        settings = replace(
            settings, max_model_len=max_model_len, max_num_seqs=scheduler.max_num_seqs
        )
        self._stats = self._engine.stats
        self._is_idle = True
        self._first: list[Sequence] = []  # of those submitted to an idle engine
        self._info = replace(
            _info(model, settings, plan),
            load_s=load_s,
            compile_wait_s=compile_wait_s,
            warmup_s=warmup_s,
        )

    @property
    def info(self) -> BackendInfo:
        """What was built."""
        return self._info

    @property
    def stats(self) -> EngineStats:
        """Totals so far; the same object, updated in place."""
        return self._stats

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet returned."""
        return 0 if self._engine is None else self._engine.num_unfinished

    @property
    def num_waiting(self) -> int:
        """Sequences submitted and not yet started."""
        return 0 if self._engine is None else self._engine.scheduler.num_waiting

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences; see `inference.backends.checks.check_sequence` for what is refused."""
        engine = self._running_engine()
        accepted = check_sequences(sequences, engine.seq_ids, self._info.max_model_len)
        engine.submit(accepted)
        if self._is_idle:
            self._first += accepted

    def step(self) -> list[Completion]:
        """Launch the next forward pass and return what an earlier one finished.

        Raises:
            EngineFault: the device failed for a reason other than memory.
            OutOfMemory: it is out of memory even after shrinking.
        """
        engine = self._running_engine()
        if self._first:
            self._expect(engine)
        finished = engine.step()
        self._is_idle = engine.is_idle
        is_time = not engine.num_unfinished or self.stats.num_steps % _STEPS_A_LOOK == 0
        if is_time and torch.cuda.is_available():
            self.stats.peak_device_bytes = torch.cuda.max_memory_allocated()
        return finished

    def _expect(self, engine: PagedEngine) -> None:
        """Have graphs captured that what was submitted needs, before its first step. Raises as `step`."""
        first, self._first = self._first, []
        needs = SamplingNeeds.of_all({SamplingNeeds.of(sequence.sampling) for sequence in first})
        num_tokens = engine.scheduler.foreseen_step_tokens()
        try:
            engine.runner.expect(needs, num_rows=len(first), num_tokens=num_tokens)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise EngineFault(f"the device failed before the first step: {error}") from error
            if engine.runner.has_peers:
                raise OutOfMemory(
                    f"out of memory before the first step, of {num_tokens} tokens: {first_line(error)}; lower "
                    f"engine.max_num_batched_tokens or engine.max_num_seqs, or use more ranks"
                ) from error
            logger.warning("out of memory while graphs are captured before the first step")
            torch.cuda.empty_cache()

    def _running_engine(self) -> PagedEngine:
        if self._engine is None:
            raise EngineFault("the backend is closed; build another one")
        return self._engine

    def close(self) -> None:
        """Free the device; the backend is unusable afterwards. Safe to repeat."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _info(model: PagedModel, settings: PagedSettings, plan: MemoryPlan) -> BackendInfo:
    is_cuda = model.device.type == "cuda"
    return BackendInfo(
        backend="paged",
        device=torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        dtype=dtype_name(model.dtype),
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        memory=plan.as_dict(),
    )


def _load_model(
    files: Arriving,
    folder: SmallFiles,
    config: EngineConfig,
    ranks: TensorParallel,
    device: torch.device,
) -> PagedModel:
    """Load the weights and make the engine's model of them.

    Raises:
        EngineConfigError: the weights do not fit, with the arithmetic.
        OutOfMemory: they do, and the device is full of something else.
    """
    try:
        if config.quantization == "fp8":
            from inference.quantised_loading import load_quantised

            return load_quantised(files, config, ranks, device, _ops())
        return make_paged_model(_load(files, config, ranks, device), _ops(), ranks=ranks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _too_full(folder, config, ranks) from error


def _too_full(folder: SmallFiles, config: EngineConfig, ranks: TensorParallel) -> OutOfMemory:
    shape = read_model_shape(folder.path)
    dtype = shape.dtype if config.dtype == "auto" else config.dtype
    kind = "fp8" if config.quantization == "fp8" else "none"
    needed = shape.weight_bytes_per_rank(ranks.size, dtype, kind)
    return OutOfMemory(
        f"out of memory while the model is loaded: {needed / 1e9:.1f} GB of weights in "
        f"{dtype if kind == 'none' else kind} on each of {ranks.size} ranks; free the device of other "
        f"processes, or use more ranks or a larger device"
    )


def _load(
    files: Arriving, config: EngineConfig, ranks: TensorParallel, device: torch.device
) -> Any:
    if ranks.size == 1:
        return load_arriving(files, config, device)
    from inference.partition import load_partition

    return load_partition(files, config, ranks, device)


def _ops() -> ModuleType:
    if not torch.cuda.is_available():
        return plain
    from inference.kernels import fused

    return fused


def _check_fp8(config: EngineConfig) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        return
    for name, value, other in (
        ("model.quantization", config.quantization, "none"),
        ("engine.kv_cache_dtype", config.kv_cache_dtype, "auto"),
    ):
        if value == "fp8":
            raise EngineConfigError(
                f"{name} is fp8: needs a CUDA device of capability 8.9 or above; use {other}"
            )
