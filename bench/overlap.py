"""The batches of a cell as a pipeline: while one is judged, the next one is sampled on a stream of its own.

One thread does both, in a fixed order: an accelerator runs what it was given while the host goes on, so the next batch is given
to it first, and what judging does on the host is hidden behind it. Settings that hold for the whole process, as the precision of
convolutions that an extractor asks for, so never reach the network that samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

Fetch = Callable[[], tuple[Tensor, float]]
_Item = TypeVar("_Item")
_Begun = TypeVar("_Begun")
_FIRST = -1  # a stream's priority; lower numbers go first, and all else runs at 0


def pipelined(
    queue: list[_Item], begin: Callable[[_Item], _Begun | None], finish: Callable[[_Begun], None], ahead: bool
) -> None:
    """Begin and finish every item of a queue, in its order.

    Args:
        queue: is emptied; `begin` and `finish` may put items in front.
        begin: the first half of the work on an item; None where there is nothing to finish.
        finish: the second half.
        ahead: whether an item is begun before the one before it is finished, so that one waits while the next is on its way.

    Raises:
        BaseException: what `begin` raises, after what waits was finished, so that it is not lost; and what `finish` raises.
    """
    waiting: list[_Begun] = []
    while queue or waiting:
        try:
            begun = begin(queue.pop(0)) if queue else None
        except BaseException:  # Ctrl-C too
            for earlier in waiting:
                finish(earlier)
            raise
        if begun is not None:
            waiting.append(begun)
        if waiting and (len(waiting) > ahead or not queue):
            finish(waiting.pop(0))


class SamplingStream:
    """Where batches are sampled, used as a context at whose end all of that is done.

    With `beside` that is a stream of an accelerator. It goes before all else that runs there, so that the network samples about
    as fast as alone and judging fills the gaps. Samples leave it through the host's memory, after an event: no tensor is used on
    two streams. Otherwise work is done when `begin` returns.

    Args:
        device: of torch.
        beside: whether sampling gets a stream of its own, where the device is of CUDA.
    """

    def __init__(self, device: str, beside: bool) -> None:
        self._stream: torch.cuda.Stream | None = None
        if beside and device.startswith("cuda"):
            self._stream = torch.cuda.Stream(device, priority=_FIRST)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # where the weights were made

    def begin(self, work: Callable[[], Tensor]) -> Fetch:
        """Begin to sample.

        Args:
            work: gives samples (B, ...) on the device.

        Returns:
            A function that waits for the samples, and gives them on the CPU with the seconds that they took: by the clock, or
            on a stream of its own from its event before the work to the one after, whatever the host did meanwhile.
        """
        if self._stream is None:
            start = time.perf_counter()
            done, seconds = work().cpu(), time.perf_counter() - start
            return lambda: (done, seconds)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            before.record()
            samples = _on_the_way(work())
            after.record()

        def fetch() -> tuple[Tensor, float]:
            after.synchronize()
            return samples, before.elapsed_time(after) / 1e3

        return fetch

    def wait(self) -> None:
        """Until all that was begun is done, so that memory it uses may be given up."""
        if self._stream is not None:
            self._stream.synchronize()

    def __enter__(self) -> SamplingStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.wait()


def _on_the_way(samples: Tensor) -> Tensor:
    """A copy in pinned memory of the host, which the accelerator fills when it has got there."""
    return torch.empty_like(samples, device="cpu", pin_memory=True).copy_(samples, non_blocking=True)
