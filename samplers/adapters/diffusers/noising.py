"""What a scheduler does without steps: tables of the network's training, and clean data under noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samplers.adapters.diffusers.nodes import final_of
from samplers.adapters.diffusers.states import check_together, wide
from samplers.adapters.diffusers.training import Training


class Noising:
    """The methods of a scheduler that training calls.

    Attributes:
        betas, alphas, alphas_cumprod: (T,) float32 on the CPU; of networks that are given a training step, others have no tables.
        final_alpha_cumprod: of clean data, or of the first step where the config says so (`set_alpha_to_one=False`).
    """

    config: Any
    _training: Training

    def _set_tables(self) -> None:
        if self._training.takes != "step":
            return
        kept = torch.tensor(self._training.schedule.alphas_cumprod, dtype=torch.float64)  # type: ignore[attr-defined]
        alphas = kept / torch.cat([kept.new_ones(1), kept[:-1]])
        self.alphas_cumprod, self.alphas, self.betas = kept.float(), alphas.float(), (1.0 - alphas).float()
        self.final_alpha_cumprod = self.alphas_cumprod[0] if final_of(self.config) == "t_min" else torch.tensor(1.0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Clean data with noise, `alpha x0 + sigma eps`.

        Args:
            original_samples: (B, ...).
            noise: standard normal, of a shape that broadcasts with it: pipelines noise one image in several ways.
            timesteps: (B,), or one: the network's times.

        Raises:
            ValueError: shapes, devices or times that do not fit.
        """
        check_together("noise", noise, "original_samples", original_samples, broadcast=True)
        alpha, sigma = self._training.levels(timesteps, max(original_samples, noise, key=len))
        x = wide(original_samples)
        return (alpha.to(x.dtype) * x + sigma.to(x.dtype) * noise).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` under the name and with the arguments of diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """What a v-predicting network is trained to give, `alpha eps - sigma x0`; arguments as in `add_noise`."""
        check_together("noise", noise, "sample", sample)
        alpha, sigma = self._training.levels(timesteps, sample)
        x = wide(sample)
        return (alpha.to(x.dtype) * noise - sigma.to(x.dtype) * x).to(sample.dtype)
