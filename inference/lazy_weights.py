"""A state dict whose tensors are on their way: whoever asks for one waits for it, and takes it over.

transformers indexes each tensor of a state dict once, from a few threads, when its model is ready for
it. A thread of ours loads the files meanwhile, in the order in which they come; tensors that are on the
right device with the right dtype become the parameters themselves, so nothing is held twice.
"""

import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import torch

from inference.arriving import Arriving
from inference.errors import ModelError
from inference.load_weights import Slicer, load_weights
from inference.weights import check_weight_file, indexed_tensors


class LazyTensor:
    """One tensor of a `LazyWeights`; indexing it with `...` waits for it and lets go of it."""

    def __init__(self, weights: "LazyWeights", future: "Future[torch.Tensor]") -> None:
        self._weights = weights
        self._future: Future[torch.Tensor] | None = future

    def __getitem__(self, index: Any) -> torch.Tensor:
        self._weights.start()
        assert self._future is not None, "a lazy tensor can be taken once"
        assert index is ..., f"a lazy tensor is taken whole, not by {index!r}"
        tensor, self._future = self._future.result(), None
        return tensor


class LazyWeights:
    """The tensors of a model's files; loading begins when the first one is asked for."""

    def __init__(
        self, files: Arriving, *, device: torch.device, slicer: Slicer | None = None
    ) -> None:
        """`slicer`: which part of each tensor this rank holds.

        Raises:
            ModelError: the names of the tensors cannot be read; or the error of who fills the folder.
        """
        self._files = files
        self._device = device
        self._slicer = slicer
        self._futures: dict[str, Future[torch.Tensor]] = {
            name: Future() for name in tensor_names(files)
        }
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def state(self) -> dict[str, LazyTensor]:
        """Every tensor by name; call once."""
        return {name: LazyTensor(self, future) for name, future in self._futures.items()}

    def finish(self) -> None:
        """Wait until every file is loaded. Raises ModelError; or the error of who fills the folder."""
        if self._thread is not None:
            self._thread.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what ended the loading early; consumers may have seen it in another guise."""
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """Begin to load. Safe to repeat, from any thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._load, name="nightjar-weights", daemon=True
                )
                self._thread.start()

    def __enter__(self) -> "LazyWeights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None and self._files.is_done:
            self._thread.join()

    def _load(self) -> None:
        try:
            for name, tensor in load_weights(
                self._files.weight_files(), device=self._device, slicer=self._slicer
            ):
                if self._stop.is_set():
                    return
                future = self._futures.pop(name, None)  # others are not in the index: not wanted
                if future is not None:
                    future.set_result(tensor)
            if self._futures:
                raise ModelError(
                    f"{self._files.folder()}: tensor {min(self._futures)} named by the index is in none "
                    f"of the weight files; fetch the whole model again"
                )
        except BaseException as error:  # raised where the tensors are waited for
            self._error = error
            for future in self._futures.values():
                future.set_exception(error)


def tensor_names(files: Arriving) -> list[str]:
    """Return the names of all tensors: the index knows before the files are there; a single file must be.

    Raises:
        ModelError: they cannot be read; or the error of who fills the folder.
    """
    tensors = indexed_tensors(files.folder())
    if tensors is not None:
        return list(tensors)
    (path,) = files.weight_files()
    return list(check_weight_file(path).tensor_names)
