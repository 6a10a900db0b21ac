"""What all wrappers share: an epsilon-model that is made of others and calls them with what it was called with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from samplers.model import Affine, EpsModel, Scalar, require_model


class Wrapped(EpsModel):
    """A model around another one, which it calls through `output`: at the level (alpha, sigma) that the executor knows.

    So a wrapper can decide by the noise level without waiting for the device, and what it returns may be a network's raw
    output, which no conversion has rounded. `net`, `weights`, `schedule` and `sigma_data` are those of the model inside.

    Args:
        model: the model inside.
        predicts: what `output` gives; None: what the model inside predicts.

    Raises:
        TypeError: not a model.
    """

    def __init__(self, model: EpsModel, predicts: str | None = None) -> None:
        require_model("model", model)
        super().__init__(model.net, model.schedule, predicts or model.predicts, sigma_data=model.sigma_data)
        self.model = model

    @property
    def weights(self) -> Tensor | None:
        """The first parameter of the model inside."""
        return self.model.weights

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As that of the model inside where both predict the same."""
        if self.predicts != self.model.predicts:
            return super().affine(kind, t, alpha, sigma)
        return self.model.affine(kind, t, alpha, sigma)

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """What the wrapper makes of the model inside; here its output."""
        return self.model.output(x, times, alpha, sigma, cond)

    def begin(self) -> EpsModel:
        """The wrapper around what the model inside is for one run."""
        return self.around(self.model.begin())

    def around(self, model: EpsModel) -> EpsModel:
        """The same wrapper around another model, such as one that is made for a run."""
        if model is self.model:
            return self
        other = copy.copy(self)
        other.model, other.net, other.compiled = model, model.net, {}
        return other

    def with_networks(self, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> EpsModel:
        """A copy in which every network is `change(net)`."""
        return self.around(self.model.with_networks(change))
