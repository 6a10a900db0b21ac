"""Networks that learned the variance of a step beside epsilon, with 2 C channels out for C in, and the sampler that uses both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from samplers.execute import Callback, NoiseSource, noise_of
from samplers.grid import Nodes, Points
from samplers.model import EpsModel
from samplers.sampling import make_plan, sample


@runtime_checkable
class HasVariance(Protocol):
    """A network of an epsilon-model that can tell the second half of its output too."""

    def halves(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor | None]:
        """The prediction and the learned variance's interpolation v in [-1, 1], each of x's shape; None where there is none."""


def split(out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The two halves of an output (B, 2 C, ...) for states x (B, C, ...); the output itself and None where it has C channels."""
    channels = x.shape[1] if x.dim() > 1 else 0
    if out.dim() == x.dim() and channels and out.shape[1] == 2 * channels:
        return out[:, :channels], out[:, channels:]
    return out, None


def scale_of(variance: Tensor, sigma: float, after: float) -> Tensor:
    """What noise of "fixed_small" is multiplied with to be of the learned variance, see `sample_learned_variance`.

    Args:
        variance: (B, C, ...) the interpolation v that the network learned.
        sigma, after: of the nodes at which a step begins and ends.
    """
    return torch.pow(sigma / after, (variance + 1) / 2)


class _Keeper:
    """A network that keeps the learned variance of its last call."""

    def __init__(self, net: HasVariance) -> None:
        self.net = net
        self.variance: Tensor | None = None

    def parameters(self) -> Any:
        """Of the network."""
        found = getattr(self.net, "parameters", None)
        return found() if callable(found) else iter(())

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, self.variance = self.net.halves(x, t, **cond)
        if self.variance is None:
            raise ValueError(
                f"model's network gives {prediction.shape[1]} channels for {x.shape[1]}, and so no variance; one that learned "
                "it gives twice as many: use the sampler 'ddpm' with variance='fixed_small' or 'fixed_large'"
            )
        return prediction


def sample_learned_variance(
    model: EpsModel,
    *,
    x_T: Tensor | None = None,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    steps: int | None = None,
    timesteps: Nodes | None = None,
    sigmas: Nodes | None = None,
    grid: str | Points | None = None,
    final: str | None = None,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    check: bool | str = True,
) -> Tensor:
    """The sampler "ddpm" with the variance that the network learned, per number of the sample.

    Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15: `log Sigma = f log beta + (1 - f) log beta~` with f = (v + 1) / 2.
    The plan of `ddpm` with `variance="fixed_small"` has the noise `sqrt(beta~) z`, and on any grid
    `beta / beta~ = (sigma / sigma')^2`, so that noise times `(sigma / sigma')^f` is exact.

    Args:
        model: as `eps_model_from_guided_diffusion` and `eps_model_from_diffusers` make it of a network with 2 C channels out; or
            guided, where the variance is that of the conditional prediction, or with `batched=False` of the last one. Under
            `guidance.clip` or `threshold` x0 is changed before the mean is made of it, and the variance is not, as with
            `clip_denoised` of guided-diffusion.
        x_T, shape, seed, indices, steps, timesteps, sigmas, grid, final, noise_source, callback, cond, check: as in
            `samplers.sample`.

    Returns:
        Samples (B, ...).

    Raises:
        TypeError: a model whose network cannot tell the second half.
        ValueError: a network that gives C channels; or as `samplers.sample`.
    """
    net = getattr(model, "net", None)
    if not isinstance(model, EpsModel) or not isinstance(net, HasVariance):
        raise TypeError(
            "model must be an EpsModel whose network tells its second half, as eps_model_from_guided_diffusion and "
            f"eps_model_from_diffusers make it, got {type(model).__name__} of {type(net).__name__}"
        )
    keeper = _Keeper(net)
    kept = model.with_networks(lambda other: keeper if other is net else other)
    where: dict[str, Any] = {"steps": steps, "timesteps": timesteps, "sigmas": sigmas, "grid": grid, "final": final}
    plan = make_plan("ddpm", model.schedule, **where)
    batch = len(x_T) if x_T is not None else int(shape[0]) if shape else 0
    draw = noise_of(noise_source, seed, indices, batch, "cpu" if x_T is None else x_T.device)
    start: dict[str, Any] = {"x_T": x_T, "shape": shape, "seed": seed, "indices": indices}
    how: dict[str, Any] = {"callback": callback, "cond": cond, "check": check}
    scaled = _scaled(draw, [float(model.schedule.sigma(t)) for t in plan.times], keeper)
    return sample(kept, "ddpm", **start, **where, noise_source=scaled, **how)


def _scaled(draw: NoiseSource, sigmas: Sequence[float], keeper: _Keeper) -> NoiseSource:
    """Noises of "fixed_small" made those of the learned variance: the k-th is drawn right after the k-th network call."""

    def noise(k: int, like: Tensor) -> Tensor:
        assert keeper.variance is not None, "the network is called before the noise is drawn"
        return draw(k, like) * scale_of(keeper.variance[: len(like)], sigmas[k], sigmas[k + 1])

    return noise
