"""Models of other toolkits as epsilon-models: each against one call and one step as its own toolkit makes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samplers import sample, schedules
from samplers.adapters.diffusers import eps_model_from_diffusers
from samplers.adapters.edm import eps_model_from_edm

diffusers = pytest.importorskip("diffusers")
WIDTH = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 4, 8, 8)


def made(kind: str, **config: Any) -> nn.Module:
    """A network of diffusers with random weights, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(diffusers, kind)(**config)
        for weight in network.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.normal_(weight, std=0.2)
    return network.eval().requires_grad_(False)


SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    size = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
    return made("DiTTransformer2DModel", **SMALL, **size)


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return made(
        "FluxTransformer2DModel",
        **{**SMALL, "attention_head_dim": 16},
        patch_size=1,
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


# networks of diffusers -----------------------------------------------------------------------------------------------


def test_dit_is_called_with_its_labels_and_its_first_half_is_epsilon(dit: nn.Module) -> None:
    scheduler, labels = diffusers.DDIMScheduler(clip_sample=False), torch.tensor([3, 10])
    model = eps_model_from_diffusers(dit, scheduler)
    step = torch.tensor([400, 400])
    out = dit(X, timestep=step, class_labels=labels).sample
    assert out.shape[1] == 8
    assert torch.allclose(model.eps(X, 400.0, class_labels=labels), out[:, :4], atol=1e-5)
    scheduler.set_timesteps(10)
    theirs = scheduler.step(out[:, :4], 400, X).prev_sample
    ours = sample(model, "ddim", x_T=X, timesteps=[400, 300], cond={"class_labels": labels})
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_pixart_is_called_with_text_and_without_sizes() -> None:
    size = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8}
    net = made("PixArtTransformer2DModel", **SMALL, **size, cross_attention_dim=WIDTH, caption_channels=12)
    text, mask = randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model = eps_model_from_diffusers(net, diffusers.DPMSolverMultistepScheduler())
    none = {"resolution": None, "aspect_ratio": None}
    how = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    out = net(X, timestep=torch.tensor([70, 70]), added_cond_kwargs=none, **how).sample
    assert torch.allclose(model.eps(X, 70.0, **how), out[:, :4], atol=1e-5)


def test_sd3_takes_a_thousand_times_the_time_and_steps_as_its_scheduler() -> None:
    size = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": 12, "caption_projection_dim": 16}
    net, scheduler = (
        made("SD3Transformer2DModel", **SMALL, **size, **text),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    cond = {"encoder_hidden_states": randn(2, 5, WIDTH), "pooled_projections": randn(2, 12)}
    scheduler.set_timesteps(4)
    sigmas, t = scheduler.sigmas, scheduler.timesteps[1]
    out = net(hidden_states=X, timestep=t.expand(2), **cond).sample
    scheduler.set_begin_index(1)
    theirs = scheduler.step(out, t, X).prev_sample
    model = eps_model_from_diffusers(net, scheduler)
    # the shift lies in the nodes
    ours = sample(model, "euler", x_T=X, timesteps=[float(sigmas[1]), float(sigmas[2])], cond=cond)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_flux_is_packed_takes_the_time_itself_and_steps_as_its_scheduler(flux: nn.Module) -> None:
    pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    x = randn(2, 4, 8, 6)
    cond = {"encoder_hidden_states": randn(2, 5, WIDTH), "pooled_projections": randn(2, WIDTH)}
    cond["guidance"] = torch.tensor([3.5, 1.0])
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32)
    places = {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[1]
    out = flux(hidden_states=pack(x, 2, 4, 8, 6), timestep=t.expand(2) / 1000, **cond, **places).sample
    scheduler.set_begin_index(1)
    theirs = unpack(scheduler.step(out, t, pack(x, 2, 4, 8, 6)).prev_sample, 16, 12, 2)
    nodes = [float(sigma) for sigma in scheduler.sigmas[1:3]]
    ours = sample(eps_model_from_diffusers(flux, scheduler), "euler", x_T=x, timesteps=nodes, cond=cond)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, x, atol=1e-2)


def test_flux_says_what_it_needs(flux: nn.Module) -> None:
    model = eps_model_from_diffusers(flux, diffusers.FlowMatchEulerDiscreteScheduler())
    cond = {"encoder_hidden_states": randn(2, 5, WIDTH), "pooled_projections": randn(2, WIDTH)}
    with pytest.raises(ValueError, match=r"cond must have 'guidance' \(B,\), such as 3\.5"):
        model(X, 0.5, **cond)
    with pytest.raises(ValueError, match=r"x must be latents \(B, 4, H, W\) with even H and W for Flux"):
        model(randn(2, 4, 7, 8), 0.5, **cond)


def test_conditions_of_sdxl_may_be_flat() -> None:
    net = made(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    model = eps_model_from_diffusers(net, scheduler)
    text, added = randn(2, 5, WIDTH), {"text_embeds": randn(2, 12), "time_ids": torch.full((2, 6), 16.0)}
    out = net(X, 300, encoder_hidden_states=text, added_cond_kwargs=added).sample
    assert torch.allclose(model.eps(X, 300.0, encoder_hidden_states=text, **added), out, atol=1e-5)
    with pytest.raises(ValueError, match="cond must have 'encoder_hidden_states', without which UNet2DConditionModel"):
        model.eps(X, 300.0, **added)
    with pytest.raises(ValueError, match="unknown cond of UNet2DConditionModel 'encoder_hidden_state'; did you mean"):
        model.eps(X, 300.0, encoder_hidden_state=text)
    with pytest.raises(ValueError, match=r"cond\['encoder_hidden_states'\] is on meta, x on cpu"):
        model.eps(X, 300.0, encoder_hidden_states=text.to("meta"), **added)


def test_a_transformer_whose_time_is_not_known_is_refused(dit: nn.Module) -> None:
    other = type("ReversedTransformer", (nn.Module,), {"__module__": "diffusers.models.transformers.x"})()
    with pytest.raises(ValueError, match="network of class ReversedTransformer matches flows in a convention"):
        eps_model_from_diffusers(other, diffusers.FlowMatchEulerDiscreteScheduler())


class Seen(nn.Module):
    """Gives back its state times a factor, and keeps the time it was given."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor, self.t = factor, torch.empty(0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.t = t
        return self.factor * x


def test_a_multistep_scheduler_on_flow_sigmas_matches_flows() -> None:
    net = Seen()
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    model = eps_model_from_diffusers(net, scheduler)
    assert torch.allclose(model.x0(X, 0.4), X - 0.4 * 0.5 * X)
    assert torch.allclose(net.t, torch.tensor([400.0, 400.0]))


def test_preconditioning_in_atan_is_that_of_its_scheduler() -> None:
    class Atan(diffusers.EDMEulerScheduler):  # as the scheduler of Stable Audio does, which needs a package more
        def precondition_noise(self, sigma: Tensor | float) -> Tensor:
            return torch.as_tensor(sigma).atan() / math.pi * 2

    Atan.__name__ = "CosineDPMSolverMultistepScheduler"
    net, scheduler = Seen(), Atan(sigma_data=1.0, prediction_type="v_prediction")
    model = eps_model_from_diffusers(net, scheduler)
    theirs = scheduler.precondition_outputs(X, net(scheduler.precondition_inputs(X, 7.0), net.t), 7.0)
    assert torch.allclose(model.x0(X, 7.0), theirs, atol=1e-5)
    assert torch.allclose(net.t, torch.full((2,), math.atan(7.0) / math.pi * 2), atol=1e-5)


def test_continuous_v_prediction_is_that_of_its_scheduler() -> None:
    config = {"sigma_min": 0.01, "sigma_max": 700.0, "use_karras_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", **config)
    scheduler.set_timesteps(5)
    t = scheduler.timesteps[2]
    net = Seen(0.3)
    sigma = float(scheduler.sigmas[2])
    theirs = scheduler.step(
        net(scheduler.scale_model_input(X * sigma, t), t.expand(2)), t, X * sigma
    ).pred_original_sample
    model = eps_model_from_diffusers(net, scheduler)
    assert torch.allclose(model.x0(X * sigma, sigma), theirs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(net.t, t.expand(2), atol=1e-5)


def test_a_variance_exploding_network_gives_the_score_at_sigma() -> None:
    net = Seen(-0.2)
    model = eps_model_from_diffusers(net, diffusers.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0))
    assert torch.allclose(model.eps(X, 4.0), 0.2 * 4.0 * X)
    assert torch.equal(net.t, torch.tensor([4.0, 4.0]))
    assert model.schedule.t_max == 50.0


# EDM -----------------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """A preconditioned network with the interface of EDM's, on a raw network of one convolution (table 1 of the paper)."""

    def __init__(
        self, data: float = 0.5, label_dim: int = 3, sigma_min: float = 0.0, sigma_max: float = math.inf
    ) -> None:
        super().__init__()
        self.sigma_data, self.label_dim, self.sigma_min, self.sigma_max = data, label_dim, sigma_min, sigma_max
        self.model = Raw(label_dim)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, return_logvar: bool = False) -> Any:
        s = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        total = s**2 + self.sigma_data**2
        raw = self.model(x.to(torch.float32) / total.sqrt(), s.log().flatten() / 4, class_labels)
        denoised = self.sigma_data**2 / total * x + s * self.sigma_data / total.sqrt() * raw
        return (denoised, s) if return_logvar else denoised


class Raw(nn.Module):
    def __init__(self, label_dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.conv, self.label = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(max(label_dim, 1), 4)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out = self.conv(x) * c_noise.cos().view(-1, 1, 1, 1)
        return out if class_labels is None else out + self.label(class_labels)[:, :, None, None]


@torch.no_grad()
def test_the_denoiser_and_the_raw_network_of_edm_are_the_same_model() -> None:
    net = Denoiser(0.7)
    wrapped, raw = eps_model_from_edm(net), eps_model_from_edm(net.model, sigma_data=0.7)
    assert (wrapped.predicts, raw.predicts) == ("x0", "edm")
    assert (wrapped.schedule.t_min, wrapped.schedule.t_max) == (0.002, 80.0)
    labels = torch.tensor([0, 2])
    rows = torch.eye(3)[labels]
    for sigma in (0.05, 3.0, 60.0):
        x = X * sigma
        theirs = net(x, torch.full((2,), sigma), rows)
        assert torch.allclose(wrapped.x0(x, sigma, class_labels=labels), theirs, rtol=1e-4, atol=1e-4)
        assert torch.allclose(raw.x0(x, sigma, class_labels=rows), theirs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(wrapped.x0(x, sigma, class_labels=labels, return_logvar=True), theirs, atol=1e-4)


@torch.no_grad()
def test_a_denoisers_own_range_and_data_are_respected() -> None:
    narrow = eps_model_from_edm(Denoiser(sigma_min=0.01, sigma_max=50.0))
    assert (narrow.schedule.t_min, narrow.schedule.t_max) == (0.01, 50.0)
    with pytest.raises(ValueError, match=r"sigma_data must be None or the denoiser's own 0\.7, got 0\.5"):
        eps_model_from_edm(Denoiser(0.7), sigma_data=0.5)
    with pytest.raises(ValueError, match=r"class_labels must be integers \(B,\) in \[0, 3\)"):
        eps_model_from_edm(Denoiser()).x0(X, 1.0, class_labels=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="class_labels must be None for a network without labels"):
        eps_model_from_edm(Denoiser(label_dim=0)).x0(X, 1.0, class_labels=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got str"):
        eps_model_from_edm("edm-cifar10-32x32-cond-vp.pkl")  # type: ignore[arg-type]


# a module of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "score", "flow", "edm"])
def test_a_module_with_any_parameterisation(exact: Any, predicts: str) -> None:
    """The same exact model behind each gives the same samples."""
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edm = schedules.edm(0.01, 20.0)
    reference = sample(exact(edm), "heun", x_T=20 * x, steps=6)
    assert torch.allclose(sample(exact(edm, predicts), "heun", x_T=20 * x, steps=6), reference, atol=1e-8)
