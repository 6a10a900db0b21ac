"""Learned variances, respacing, and weights from files: checkpoints of guided-diffusion and of others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samplers import EpsModel, guidance, sample, schedules
from samplers.adapters.diffusers import eps_model_from_diffusers
from samplers.adapters.guided_diffusion import eps_model_from_guided_diffusion, respaced, training_betas
from samplers.adapters.variance import sample_learned_variance
from samplers.adapters.weights import load_weights

diffusers = pytest.importorskip("diffusers")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 4, 8, 8)


class Learned(nn.Module):
    """A network of 2 C channels: epsilon, and a variance that differs from number to number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.t = torch.empty(0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.t = t
        shift = 0.0 if y is None else y.view(-1, 1, 1, 1)
        return torch.cat([0.9 * x.tanh() + shift, (3.0 * x).sin()], 1)


class Plain(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x


@pytest.mark.parametrize("spacing", ["1000", "20", "7,5", "ddim25"])
@torch.no_grad()
def test_the_learned_variance_is_that_of_diffusers(spacing: str) -> None:
    net, x = Learned(), X.double()
    model = eps_model_from_guided_diffusion(net, learn_sigma=True)
    nodes = respaced(model.schedule, spacing)
    nodes = [*nodes[:12], *nodes[-2:]] if len(nodes) > 14 else nodes
    steps = [round(float(model.schedule.t_of_lam(-math.log(sigma)))) for sigma in nodes[:-1]]
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(training_betas("linear", 1000)), 0)
    scheduler.set_timesteps(timesteps=steps)
    noises, drawn = [randn(*X.shape, seed=k).double() for k in range(len(nodes))], iter(range(len(nodes)))
    theirs, module = x, diffusers.schedulers.scheduling_ddpm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: noises[next(drawn)])
        for t in scheduler.timesteps:
            theirs = scheduler.step(net(theirs, t), t, theirs).prev_sample
    ours = sample_learned_variance(model, x_T=x, sigmas=nodes, noise_source=lambda k, like: noises[k])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 * float(theirs.abs().max()))
    fixed = sample(model, "ddpm", x_T=x, sigmas=nodes, noise_source=lambda k, like: noises[k])
    assert (fixed - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 1.5])
@torch.no_grad()
def test_clipping_changes_the_mean_and_not_the_learned_variance(scale: float) -> None:
    """The loop of guided-diffusion by hand, with `clip_denoised`: its p_mean_variance and p_sample, on a respaced process."""
    net, spacing = Learned(), "12"
    model = eps_model_from_guided_diffusion(net, learn_sigma=True)
    nodes = respaced(model.schedule, spacing)
    labels, null = torch.tensor([0.3, -0.2]).double(), 0.1
    noises = [randn(*X.shape, seed=k).double() for k in range(len(nodes))]

    kept = torch.cumprod(1 - torch.from_numpy(training_betas("linear", 1000)), 0)
    steps = [round(float(model.schedule.t_of_lam(-math.log(sigma)))) for sigma in nodes[:-1]]
    x = X.double()
    for k, t in enumerate(steps):
        bar, before = kept[t], kept[steps[k + 1]] if k + 1 < len(steps) else torch.tensor(1.0).double()
        beta = 1 - bar / before
        eps, v = net(x, torch.tensor(t), labels).chunk(2, 1)
        without = net(x, torch.tensor(t), torch.full_like(labels, null)).chunk(2, 1)[0]
        eps = without + scale * (eps - without)
        x0 = (x / bar.sqrt() - (1 / bar - 1).sqrt() * eps).clamp(-1, 1)
        mean = beta * before.sqrt() / (1 - bar) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - bar) * x
        if k + 1 < len(steps):
            smallest = (beta * (1 - before) / (1 - bar)).log()
            share = (v + 1) / 2
            mean = mean + (0.5 * (share * beta.log() + (1 - share) * smallest)).exp() * noises[k]
        x = mean

    guided = model if scale == 1 else guidance.classifier_free(model, scale, {"y": null})
    how: dict[str, Any] = {"x_T": X.double(), "sigmas": nodes, "cond": {"y": labels}}
    ours = sample_learned_variance(guidance.clip(guided), noise_source=lambda k, like: noises[k], **how)
    assert torch.allclose(ours, x, rtol=0, atol=1e-10)
    free = sample_learned_variance(guided, noise_source=lambda k, like: noises[k], **how)
    assert (free - x).abs().max() > 1e-2
    thresholded = sample_learned_variance(
        guidance.threshold(guided, limit=1.0), noise_source=lambda k, like: noises[k], **how
    )
    assert torch.allclose(thresholded, x, rtol=0, atol=1e-10)  # whose limit makes it clip


@torch.no_grad()
def test_equation_15_of_improved_ddpm() -> None:
    """One step against the formula itself, at nodes far apart."""
    model, x, z = eps_model_from_guided_diffusion(Learned()), X.double(), randn(2, 4, 8, 8, seed=9).double()
    bar = torch.cumprod(1 - torch.from_numpy(training_betas("linear", 1000)), 0)
    now, then = bar[600], bar[400]
    beta = 1 - now / then
    small = (1 - then) / (1 - now) * beta
    eps, v = model.net(x, torch.full((2,), 600.0)), (3 * x).sin()
    log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * small.log()
    mean = (x - beta / (1 - now).sqrt() * eps) / (1 - beta).sqrt()
    ours = sample_learned_variance(model, x_T=x, timesteps=[600, 400], noise_source=lambda k, like: z)
    assert torch.allclose(ours, mean + (0.5 * log_variance).exp() * z, rtol=0, atol=1e-12)


def test_the_learned_variance_of_a_sample_is_the_same_in_any_batch() -> None:
    model = eps_model_from_guided_diffusion(Learned())
    how: dict[str, Any] = {"steps": 5, "seed": 3}
    both = sample_learned_variance(model, shape=(3, 4, 8, 8), **how)
    one = sample_learned_variance(model, shape=(1, 4, 8, 8), indices=torch.tensor([2]), **how)
    assert torch.allclose(both[2:], one)
    assert not torch.allclose(both[1:2], one)


@torch.no_grad()
def test_a_network_of_diffusers_offers_its_variance_too() -> None:
    x, how = X.double(), {"steps": 3, "seed": 1}
    ours = sample_learned_variance(eps_model_from_diffusers(Learned(), diffusers.DDPMScheduler()), x_T=x, **how)  # type: ignore[arg-type]
    theirs = sample_learned_variance(eps_model_from_guided_diffusion(Learned()), x_T=x, **how)  # type: ignore[arg-type]
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_time_labels_and_channels_of_guided_diffusion() -> None:
    net = Learned()
    model = eps_model_from_guided_diffusion(net, schedule="cosine", steps=4000, rescale_timesteps=True)
    labels = torch.tensor([0.0, 2.0]).double()
    x = X.double()
    assert torch.allclose(model.eps(x, 2000.0, class_labels=labels), 0.9 * x.tanh() + labels.view(2, 1, 1, 1))
    assert torch.equal(net.t, torch.tensor([500.0, 500.0]).double())
    with pytest.raises(ValueError, match="learn_sigma=False means 1 x 4 channels out of the network, which gives 8"):
        eps_model_from_guided_diffusion(net, learn_sigma=False)(x, 3.0)
    plain = eps_model_from_guided_diffusion(Plain())
    with pytest.raises(ValueError, match="gives 4 channels for 4, and so no variance"):
        sample_learned_variance(plain, shape=(1, 4, 8, 8), steps=2)
    with pytest.raises(TypeError, match="model must be an EpsModel whose network tells its second half"):
        sample_learned_variance(EpsModel(Plain(), schedules.vp_linear()), shape=(1, 4, 8, 8), steps=2)
    with pytest.raises(ValueError, match="unknown schedule 'cos'; did you mean 'cosine'"):
        eps_model_from_guided_diffusion(net, schedule="cos")


def test_betas_are_those_of_diffusers() -> None:
    for ours, theirs in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        betas = diffusers.DDPMScheduler(beta_schedule=theirs).betas.double()
        assert torch.allclose(torch.from_numpy(training_betas(ours, 1000)), betas, rtol=1e-4, atol=1e-7)


def test_respaced_nodes() -> None:
    def times(steps: int, spacing: str | list[int]) -> list[int]:
        schedule = schedules.from_betas(training_betas("cosine", steps))
        sigmas = respaced(schedule, spacing)
        assert sigmas[-1] == 0.0
        return [round(float(schedule.t_of_lam(-math.log(sigma)))) for sigma in sigmas[:-1]]

    assert times(1000, "4") == [999, 666, 333, 0]
    assert times(300, "3,1") == [150, 149, 74, 0]
    assert times(1000, "ddim25") == list(range(960, -1, -40))
    assert len(times(1000, [10, 10, 20])) == 40
    for spacing, match in (("ddim999", "no stride"), ("0", "cannot be divided"), ("ten", "must be counts such as")):
        with pytest.raises(ValueError, match=match):
            times(1000, spacing)
    with pytest.raises(TypeError, match="schedule must be discrete, as model.schedule is, got Flow"):
        respaced(schedules.flow(), "10")  # type: ignore[arg-type]


# weights -------------------------------------------------------------------------------------------------------------


def net_of(labels: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(labels, 4))


class Evil:
    """What a pickle may hold: reading it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def test_weights_are_read_and_a_pickle_is_not(tmp_path: Path) -> None:
    import pickle

    from safetensors.torch import save_file

    net, other = net_of(3), net_of(3)
    weights = {name: value + 1 for name, value in net.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.pt")
    torch.save({"epoch": 3, "ema": {f"module.{k}": v for k, v in weights.items()}}, tmp_path / "c.ckpt")
    for file, how in (("a.safetensors", {}), ("b.pt", {}), ("c.ckpt", {"key": "ema", "prefix": "module."})):
        loaded = load_weights(net_of(3), tmp_path / file, **how)  # type: ignore[arg-type]
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": Evil(tmp_path / "never")}))
    torch.save(Evil(tmp_path / "never"), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"is a pickle: .*whatever code(.|\n)*save_file(.|\n)*net\.safetensors"):
        load_weights(other, tmp_path / "net.pkl")
    with pytest.raises(
        ValueError, match=r"is not a file of tensors alone.* would run code from it \(UnpicklingError\): where"
    ) as refused:
        load_weights(other, tmp_path / "evil.pt")
    assert "\x1b" not in str(refused.value)
    assert "still be loaded" not in str(refused.value)
    assert not (tmp_path / "never").exists()
    pickle.loads((tmp_path / "net.pkl").read_bytes())  # which would have been seen
    assert (tmp_path / "never").exists()


def test_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    torch.save({f"module.{k}": v for k, v in net_of(3).state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"lacks '0\.bias' and 3 others; try prefix='module\.'"):
        load_weights(net_of(3), tmp_path / "a.pt")
    torch.save({"ema": net_of(3).state_dict(), "model": net_of(3).state_dict()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="key must say which of ema, model"):
        load_weights(net_of(3), tmp_path / "b.pt")
    with pytest.raises(ValueError, match="unknown key in .*b.pt 'emo'; did you mean 'ema'"):
        load_weights(net_of(3), tmp_path / "b.pt", key="emo")
    with pytest.raises(ValueError, match=r"1\.weight has shape \(4, 3\), module Sequential needs \(4, 5\)"):
        load_weights(net_of(5), tmp_path / "b.pt", key="ema")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_weights(net_of(3), tmp_path / "no.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_weights(net_of(3), tmp_path / "cut.safetensors")
