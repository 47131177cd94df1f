"""Backends: implementations of one protocol (`base.Backend`), chosen by name and imported lazily."""

from inference.arriving import Arriving
from inference.backends.base import Backend, BackendInfo, EngineStats
from inference.config import EngineConfig
from inference.device_dtype import with_dtype_of_device
from inference.weights import SmallFiles

__all__ = [
    "Backend",
    "BackendInfo",
    "EngineStats",
    "check_engine",
    "create_backend",
    "resolve_backend",
]


def resolve_backend(name: str, num_ranks: int) -> str:
    """Return the backend that `auto` means on this machine for so many ranks a replica; other names as they are."""
    if name != "auto":
        return name
    if num_ranks > 1:
        return "paged"
    import torch  # heavy; only to ask for a device

    return "paged" if torch.cuda.is_available() else "transformers"


def check_engine(folder: SmallFiles, config: EngineConfig, *, is_here: bool = True) -> None:
    """Refuse settings that no machine, or with `is_here` not this one, can run on this model.

    Costs no device and reads no weights, so it can be asked before anything is planned or bought.

    Raises:
        EngineConfigError: with the remedy.
        ModelError: the model is of a kind that transformers does not know.
    """
    name = resolve_backend(config.backend, config.tensor_parallel_size)
    if name != "dummy" and "auto_map" in folder.config:
        from inference.model_classes import refuse_unknown_class

        refuse_unknown_class(folder)
    if name == "zero":
        from inference.zero import check_zero

        check_zero(folder, config, is_here=is_here)
    elif name != "dummy":
        from inference.offload import check_offload
        from inference.quantization import check_quantization

        check_offload(config, name, is_here=is_here)
        check_quantization(folder, config, name, is_here=is_here)
        if name == "paged":
            from inference.family_check import check_family

            check_family(folder, config)


def create_backend(config: EngineConfig, *, arriving: Arriving | None = None) -> Backend:
    """Load the model and build the backend the config names.

    Args:
        config: what to build.
        arriving: the folder `config.model`, if files are still on their way to it.

    Raises:
        ModelError: the model folder is unusable; or the error of who fills it.
        EngineConfigError: the settings cannot work on this model or machine.
    """
    name = resolve_backend(config.backend, config.tensor_parallel_size)
    if name == "dummy":
        from inference.backends.dummy import DummyBackend

        return DummyBackend(config)
    config = with_dtype_of_device(config)
    if name == "paged" and config.tensor_parallel_size == 1:
        from inference.backends.paged import PagedBackend

        return PagedBackend(config, arriving=arriving)
    if name == "paged" and config.distributed.num_hosts == 1:
        from inference.backends.ranked import RankedBackend

        return RankedBackend(config, arriving=arriving)
    if arriving is not None:
        arriving.wait_for_all()
    if name == "paged" or (name == "zero" and config.tensor_parallel_size > 1):
        from inference.backends.ranked import RankedBackend

        return RankedBackend(config)
    if name == "transformers":
        from inference.backends.transformers import TransformersBackend

        return TransformersBackend(config)
    from inference.backends.zero import ZeroBackend

    return ZeroBackend(config)
