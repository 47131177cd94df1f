"""Staging in a thread, so that an engine can load the files that are here while others come."""

import logging
import threading
from typing import TYPE_CHECKING

from inference.arriving import Arriving
from storage.errors import StorageError
from tasks.job import RunConfig
from tasks.progress import Progress

if TYPE_CHECKING:
    from storage.staging import StagedModel

log = logging.getLogger("nightjar.model")


_CANCEL_WAIT_S = 5.0


class _GivenUp(StorageError):
    """Nobody wants the model any more."""


class StageThread:
    """One staging on its way."""

    def __init__(self, job: RunConfig, progress: Progress) -> None:
        self.files = Arriving()
        self._job = job
        self._progress = progress
        self._is_given_up = False
        self._staged: StagedModel | None = None
        self._thread = threading.Thread(target=self._run, name="nightjar-stage", daemon=True)
        self._thread.start()

    def result(self) -> "StagedModel":
        """Wait for the whole model. Raises what staging ended with."""
        self.files.wait_for_all()
        self._thread.join()
        assert self._staged is not None, "staging ended without a model or an error"
        return self._staged

    def cancel(self) -> None:
        """End the staging, or let go of its result; what was copied is resumed next time.

        A store that does not answer is not waited for: the thread ends when it does.
        """
        self._is_given_up = True
        self._thread.join(_CANCEL_WAIT_S)
        if self._staged is not None:
            self._staged.close()

    def _run(self) -> None:
        from tasks.stage import describe, stage_for  # boto3, which takes a while to import

        try:
            self._staged = stage_for(
                self._job,
                on_ready=self.files.begin,
                on_file=self.files.add,
                on_progress=self._count,
            )
            log.info("%s", describe(self._staged.report))
            self.files.finish(self._staged.path)
            if self._is_given_up:
                self._staged.close()
        except BaseException as error:  # raised where the files are waited for
            self.files.fail(error)

    def _count(self, num_bytes: int, total_bytes: int) -> None:
        if self._is_given_up:
            raise _GivenUp("staging was given up; stage again to go on")
        if not self.files.has_begun:
            self._progress.staged(num_bytes, total_bytes)
