"""Before any weights are read: how fast the ranks' all-reduce is, and what plainly slows it.

A replica that would crawl says so within seconds instead of after a night: NCCL too old, no NVLink between
the devices of one host, InfiniBand missing or unused so that hosts talk over TCP.

    bus bandwidth = 2 (N - 1) / N x bytes / seconds, which a perfect ring over links of that speed reaches
"""

import json
import logging
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from inference.config import DistributedConfig
from inference.errors import EngineConfigError
from inference.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

OLDEST_NCCL = (2, 20)
"""Before it: no user-buffer registration in graphs, and known hangs of captured collectives."""

NVLINK_GB_PER_S = 60.0
"""Two devices over PCIe 5 stay below it; the slowest NVLink pairs in use are well above."""

TCP_GB_PER_S = 6.0
"""Above what one TCP path between hosts gives; 100 Gb/s InfiniBand gives 12."""

_INFINIBAND = Path("/sys/class/infiniband")
_FACT_BYTES = 1024
_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank knows of its own links."""

    host: str
    device: str
    nccl: tuple[int, ...]
    """Version; empty without CUDA."""

    has_infiniband: bool
    """Whether its host has an InfiniBand or RoCE device at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fabric:
    """What was measured; the same on every rank."""

    bandwidth: float
    """GB/s of bus bandwidth, large messages."""

    latency_us: float
    """Of the smallest all-reduce."""

    facts: tuple[RankFacts, ...]

    @property
    def num_hosts(self) -> int:
        """Hosts the ranks are on."""
        return len({fact.host for fact in self.facts})


def check_fabric(ranks: TensorParallel, device: torch.device, config: DistributedConfig) -> Fabric:
    """Measure, log what is wrong, refuse what is slower than the job allows. Every rank must call it.

    Raises:
        EngineConfigError: below `min_bandwidth`.
    """
    fabric = measure(ranks, device)
    remarks = remarks_on(fabric)
    if ranks.rank == 0:
        for remark in remarks:
            logger.warning("%s", remark)
    if fabric.bandwidth < config.min_bandwidth:
        raise EngineConfigError(
            f"all-reduce over {ranks.size} ranks reaches {fabric.bandwidth:.2f} GB/s, "
            f"engine.distributed.min_bandwidth is {config.min_bandwidth:g}; "
            + (remarks[0] if remarks else "lower it, or use faster links")
        )
    return fabric


def measure(ranks: TensorParallel, device: torch.device) -> Fabric:
    """Time all-reduces of the group."""
    large = (64 if device.type == "cuda" else 4) << 20
    seconds = _slowest(ranks, device, large)
    return Fabric(
        bandwidth=2 * (ranks.size - 1) / ranks.size * large / seconds / 1e9,
        latency_us=_slowest(ranks, device, 4) * 1e6,
        facts=_facts_of_all(ranks, device),
    )


def remarks_on(fabric: Fabric) -> list[str]:
    """Say what slows the ranks, one line each: the fact, the number, the remedy."""
    remarks: list[str] = []
    if len(fabric.facts) == 1:
        return remarks  # a rank alone exchanges nothing
    versions = {fact.nccl for fact in fabric.facts if fact.nccl}
    if len(versions) > 1:
        found = " and ".join(_dotted(version) for version in sorted(versions))
        remarks.append(f"ranks have NCCL {found}; install the same torch everywhere")
    elif versions and min(versions) < OLDEST_NCCL:
        remarks.append(
            f"NCCL {_dotted(min(versions))} is old; use {_dotted(OLDEST_NCCL)} or later, which "
            f"comes with a newer torch"
        )
    if not versions:
        return remarks  # no devices: the links between hosts are nobody's promise
    if fabric.num_hosts == 1 and fabric.bandwidth < NVLINK_GB_PER_S:
        remarks.append(
            f"all-reduce within the host reaches {fabric.bandwidth:.1f} GB/s: no NVLink between these "
            f"devices, or peer access is off; use replicas instead of tensor parallel if the model fits"
        )
    if fabric.num_hosts > 1:
        without = sorted({fact.host for fact in fabric.facts if not fact.has_infiniband})
        if without:
            remarks.append(
                f"no InfiniBand device on {', '.join(without)}: hosts talk over TCP at "
                f"{fabric.bandwidth:.1f} GB/s; pass the devices through to the container, or keep a "
                f"replica on one host"
            )
        elif fabric.bandwidth < TCP_GB_PER_S:
            remarks.append(
                f"all-reduce between hosts reaches {fabric.bandwidth:.1f} GB/s although InfiniBand is "
                f"there: NCCL has fallen back to TCP; set engine.distributed.fabric to infiniband or "
                f"roce to see why, and engine.distributed.interface"
            )
    return remarks


def _slowest(ranks: TensorParallel, device: torch.device, num_bytes: int) -> float:
    """Return the median time of an all-reduce on the slowest rank, in seconds."""
    tensor = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    times = []
    for _ in range(1 + _REPEATS):  # the first one connects
        _synchronize(device)
        started_at = time.perf_counter()
        ranks.all_reduce(tensor)
        _synchronize(device)
        times.append(time.perf_counter() - started_at)
    median = sorted(times[1:])[_REPEATS // 2]
    return float(ranks.gather(torch.tensor([median], dtype=torch.float64)).max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _facts_of_all(ranks: TensorParallel, device: torch.device) -> tuple[RankFacts, ...]:
    mine = json.dumps(asdict(_own_facts(device))).encode().ljust(_FACT_BYTES)
    assert len(mine) == _FACT_BYTES, mine
    rows = ranks.gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    found = [json.loads(row.numpy().tobytes()) for row in rows]
    return tuple(RankFacts(**{**values, "nccl": tuple(values["nccl"])}) for values in found)


def _own_facts(device: torch.device) -> RankFacts:
    nccl: Any = ()
    name = "cpu"
    if device.type == "cuda":
        cuda: Any = torch.cuda
        nccl = cuda.nccl.version()
        name = torch.cuda.get_device_name(device)
    return RankFacts(
        host=socket.gethostname()[:200],
        device=name,
        nccl=tuple(nccl),
        has_infiniband=_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
