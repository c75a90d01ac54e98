"""Publishing: an update on its way while the learner computes its next step."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import torch

from weights.errors import DeadlineExceeded
from weights.report import PublishReport


class Publishing:
    """What `Publisher.begin` returns. The learner may go on at once with whatever only reads its weights.

    Before it writes to them (an optimizer's step), it waits until the update reads them no more: `wait_for_source`.

    Args:
        publish: does it, and calls what it is given as soon as it reads the source no more.
    """

    def __init__(self, publish: Callable[[Callable[[], None]], PublishReport]) -> None:
        self._source_is_free = threading.Event()
        self._report: Future[PublishReport] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                self._report.set_result(publish(self._source_is_free.set))
            except BaseException as error:  # a thread's edge: whoever asks for the result gets it
                self._report.set_exception(error)
            finally:
                self._source_is_free.set()

        self._thread = threading.Thread(target=run, name="publishing", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._report.done()

    def end(self) -> None:
        """Returns when it has ended, well or not; every wait in it has a deadline of its own."""
        self._thread.join()

    def wait_for_source(self, deadline_s: float) -> None:
        """Returns when the learner may write to the tensors that it publishes. DeadlineExceeded."""
        if not self._source_is_free.wait(deadline_s):
            raise DeadlineExceeded(f"the update to have read the learner's weights: waited {deadline_s:g} s")

    def result(self, deadline_s: float) -> PublishReport:
        """The report, or what `Publisher.publish` raises. DeadlineExceeded if it has not ended by then."""
        try:
            return self._report.result(deadline_s)
        except FutureTimeout as error:
            if self._report.done():
                raise
            raise DeadlineExceeded(f"the update to end: waited {deadline_s:g} s") from error
