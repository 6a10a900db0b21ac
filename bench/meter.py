"""A network that counts what it is asked, and can remember the answer to its first call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Counts the calls of a network, so that a table says what was called and not what was planned.

    Args:
        net: `net(x, t, **cond) -> output`.

    Attributes:
        calls: since `begin`, one for each time the network is called: the sequential depth.
        evaluations: rows over all those calls; one that guides itself by a doubled batch counts twice.
    """

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net, self.calls, self.evaluations = net, 0, 0
        self._first: Hashable | None = None
        self._known: dict[Hashable, Tensor] = {}

    def begin(self, first: Hashable | None = None) -> None:
        """Count from 0.

        Args:
            first: what the first call depends on beside the network; two batches for which it is equal share the answer.
        """
        self.calls = self.evaluations = 0
        self._first = first

    def forget(self) -> None:
        """Let go of the answers to first calls, each of the size of its batch."""
        self._known.clear()

    def parameters(self) -> Any:
        """Of the network: an epsilon-model reads dtype and device off the first one."""
        found = getattr(self.net, "parameters", None)
        return found() if callable(found) else iter(())

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The network's output for states x (B, ...) and times t (B,), or what it was for the same first call."""
        self.calls += 1
        self.evaluations += len(x)
        if self._first is None or self.calls > 1:
            return self.net(x, t, **cond)
        if self._first not in self._known:
            self._known[self._first] = torch.clone(self.net(x, t, **cond)).cpu()
        return self._known[self._first].to(x.device)
