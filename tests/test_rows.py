"""Plans run together, a stretch of time for each row, against the executor that runs them one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distill.rows import Stretches
from samplers import EpsModel, run_plan
from samplers.schedule import Schedule


def thirds(schedule: Schedule) -> list[np.ndarray]:
    """Four stretches of three steps each, from all noise to clean data."""
    fine = np.append(np.linspace(schedule.t_max, 0.1, 12), schedule.t_zero)
    return [fine[i : i + 4] for i in range(0, 12, 3)]


@pytest.mark.parametrize("schedule", ["cosine", "flow", "vp_linear"], indirect=True)
@pytest.mark.parametrize(
    ("sampler", "options"),
    [("ddim", {}), ("heun", {}), ("dpm-solver-3s", {}), ("dpmpp-2m", {}), ("unipc-2", {"predict": "eps"}), ("edm", {})],
)
def test_rows_are_what_the_executor_gives(
    sampler: str, options: dict[str, Any], schedule: Schedule, exact: Callable[..., EpsModel]
) -> None:
    stretches, model = Stretches(sampler, schedule, thirds(schedule), **options), exact(schedule, "v")
    x = torch.randn((9, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 3])
    got = stretches.run(model, x, place)
    for i, number in enumerate(place.tolist()):
        alone = run_plan(stretches.plans[number], model, x[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], alone, rtol=1e-10, atol=1e-12)
    assert stretches.calls == np.mean([plan.nfe for plan in stretches.plans])


def test_plans_of_one_shape_share_their_calls(exact: Callable[..., EpsModel], cosine: Schedule) -> None:
    stretches, exact_model, sizes = Stretches("ddim", cosine, thirds(cosine)), exact(cosine), []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return exact_model.net(x, t)

    stretches.run(EpsModel(net, cosine), torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert sizes == [6, 6, 6]


def test_the_condition_follows_its_row(cosine: Schedule) -> None:
    def net(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return shift[:, None].expand_as(x)

    model, x = EpsModel(net, cosine), torch.zeros(5, 2, dtype=torch.float64)
    stretches, place = Stretches("heun", cosine, thirds(cosine)), torch.tensor([3, 0, 3, 1, 2])
    shift = torch.arange(5.0, dtype=torch.float64)
    got = stretches.run(model, x, place, {"shift": shift})
    for i, number in enumerate(place.tolist()):
        alone = run_plan(stretches.plans[number], model, x[i : i + 1], cond={"shift": shift[i : i + 1]})
        torch.testing.assert_close(got[i : i + 1], alone)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("ddpm", {}, "sampler must be deterministic, 'ddpm'"),
        ("ddim", {"eta": 1.0}, r"sampler must be deterministic, 'ddim' with options \{'eta': 1\.0\}"),
        ("rk45", {}, "has no plan"),
        ("dim", {}, "unknown sampler 'dim'; did you mean 'ddim'"),
        ("ddim", {"etta": 1.0}, "'etta'; did you mean 'eta'"),
    ],
)
def test_what_cannot_teach_is_refused(sampler: str, options: dict[str, Any], message: str, cosine: Schedule) -> None:
    with pytest.raises(ValueError, match=message):
        Stretches(sampler, cosine, thirds(cosine), **options)


@pytest.fixture
def cosine() -> Schedule:
    from samplers import schedules

    return schedules.cosine()
