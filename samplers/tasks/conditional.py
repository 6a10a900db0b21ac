"""Models whose prediction of the clean data is corrected by what is known of it: the wrapper that conditional tasks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from samplers.guidance.wrapped import Wrapped
from samplers.model import Affine, EpsModel, Scalar

Predict = Callable[[Tensor], Tensor]
Correct = Callable[[Tensor, Scalar, Scalar, Predict], Tensor]


class Corrected(Wrapped):
    """A model whose x0 is `correct(x, alpha, sigma, predict)`, which every sampler takes.

    Args:
        model: of any kind of prediction.
        correct: of states x (B, ...), alpha and sigma (floats, or tensors that broadcast with x), and the function from a state
            at that level to the model's x0. A call of `predict` is a call of the network.

    Raises:
        TypeError: not a model.
    """

    def __init__(self, model: EpsModel, correct: Correct) -> None:
        super().__init__(model, "x0")
        self.correct = correct

    def affine(self, kind: str, t: Scalar, alpha: Scalar, sigma: Scalar) -> Affine:
        """As of a network that predicts x0; ValueError where the model inside gives none."""
        self.model.affine("x0", t, alpha, sigma)
        return super().affine(kind, t, alpha, sigma)

    def output(self, x: Tensor, times: Tensor, alpha: Scalar, sigma: Scalar, cond: Mapping[str, Any]) -> Tensor:
        """x0, corrected."""

        def predict(state: Tensor) -> Tensor:
            out = self.model.output(state, times, alpha, sigma, cond)
            return self.model.relation("x0", state, times, alpha, sigma).of(state, out)

        return self.correct(x, alpha, sigma, predict)
