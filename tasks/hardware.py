"""The hardware file: which GPU types there are, and what they cost. YAML in, `GpuType`s out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from inference.errors import EngineConfigError
from inference.hardware import GpuType, gpu_types
from tasks.job_machine import HardwareConfig


def default_hardware_path() -> Path:
    """The file that comes with Nightjar: inside the wheel, or `configs/` of a checkout."""
    packaged = Path(__file__).parent / "hardware.yaml"
    return (
        packaged if packaged.exists() else Path(__file__).parents[1] / "configs" / "hardware.yaml"
    )


def load_hardware(path: str | Path | None = None) -> list[GpuType]:
    """Read GPU types from `path`, by default the file that comes with Nightjar.

    Raises:
        EngineConfigError: the file cannot be read, or an entry is wrong; names file and entry.
    """
    return gpu_types(read_hardware(default_hardware_path() if path is None else path))


def hardware_of(config: HardwareConfig) -> list[GpuType]:
    """GPU types that a job may know: its own, by default those of the file that comes with Nightjar.

    Raises:
        EngineConfigError: an entry is wrong; names it.
    """
    return load_hardware() if config.gpus is None else gpu_types(config.gpus)


def read_hardware(path: str | Path) -> dict[str, Any]:
    """Read and check a hardware file, as plain values by GPU type.

    Raises:
        EngineConfigError: the file cannot be read, or an entry is wrong; names file and entry.
    """
    source = Path(path)
    try:
        content: Any = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineConfigError(f"{source}: {error.strerror}; give a hardware file") from error
    except yaml.YAMLError as error:
        raise EngineConfigError(
            f"{source}: not valid YAML ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(v, Mapping) for v in content.values()
    ):
        raise EngineConfigError(
            f"{source}: must map each GPU type to its numbers, such as H100: {{...}}"
        )
    try:
        gpu_types(content)
    except EngineConfigError as error:
        raise EngineConfigError(f"{source}: {error}") from error
    return dict(content)
