"""Which grid suits which sampler: errors on Gaussian mixtures, or on the shipped MNIST model, `python -m bench.grid_sweep`.

Every deterministic sampler on every named grid at every budget, against the converged solution; on mixtures in float64 on the
exact model, so that the error is the sampler's and the grid's alone. A grid keeps its own end: where that is clean data, so is
the solution it is compared with. Stochastic samplers have no such solution: they are judged by the Frechet distance of their
samples, on mixtures from the exact moments and on MNIST from the reference statistics.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bench.judge import digit_judge
from bench.metrics import Moments, frechet_distance, gaussian_frechet
from bench.mixture import GaussianMixture
from bench.provenance import machine
from bench.store import write_text
from bench.tuning import uses_noise
from samplers import EpsModel, Plan, list_samplers, make_plan, run_plan, schedules
from samplers.errors import unknown
from samplers.grid import GRIDS, allows
from samplers.registry import get_sampler
from samplers.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {s.name: s for s in (schedules.vp_linear(), schedules.cosine(), schedules.edm())}
CELL = ["schedule", "dim", "nfe"]
_OUT = Path("results/grids")
_TOLERANCE = 1e-10
_RMSE = "RMSE to the converged solution"


class Trajectories(ABC):
    """Start noise and the ends of its trajectories on a model, on which a plan's error is measured.

    Subclasses give `schedule`, `dim` (a label), `model`, `noise`, `cond`, `solution`: the ends at t_min (False) and at clean
    data (True), and `distance_of`: of samples from the data's distribution.
    """

    schedule: Schedule
    dim: int | str
    model: EpsModel
    noise: Tensor
    cond: dict[str, Tensor] | None = None
    solution: dict[bool, Tensor]

    @cached_property
    def _errors(self) -> dict[tuple[Plan, bool], float]:
        return {}

    def error(self, plan: Plan, distance: bool = False) -> float:
        """Of a plan's samples, inf where they are not finite: root mean square error, or the distance of the samples.

        Samplers of one plan share a run.
        """
        if (plan, distance) not in self._errors:
            x = run_plan(plan, self.model, plan.sigma_T * self.noise, cond=self.cond, check=False)
            if not x.isfinite().all():
                found = math.inf
            elif distance:
                found = self.distance_of(x)
            else:
                target = self.solution[plan.times[-1] == self.schedule.t_zero]
                found = float((x - target).square().mean().sqrt())
            self._errors[plan, distance] = found
        return self._errors[plan, distance]

    @abstractmethod
    def distance_of(self, samples: Tensor) -> float:
        """Frechet distance of samples (N, ...) from the distribution of the data."""


class Digits(Trajectories):
    """The shipped MNIST model, class-conditional, in float32; its solution is that of 200 steps of second order.

    Args:
        samples: how many trajectories.
    """

    dim = "28x28"

    def __init__(self, samples: int) -> None:
        from bench.zoo import load_model

        zoo = load_model("mnist", dtype="fp32")
        self.model, self.schedule = zoo.model, zoo.model.schedule
        self.cond = zoo.cond(torch.arange(samples))
        self.noise = torch.randn(samples, *zoo.shape, generator=torch.Generator().manual_seed(0))

    @cached_property
    def solution(self) -> dict[bool, Tensor]:  # type: ignore[override]  # computed at first use
        """At t_min by DPM-Solver++(2M) on 200 steps; at clean data that model's x0 there, one first-order step on."""
        plan = make_plan("dpmpp-2m", self.schedule, steps=200, grid="logsnr", lower_order_final=False)
        x = run_plan(plan, self.model, plan.sigma_T * self.noise, cond=self.cond)
        with torch.no_grad():
            return {False: x, True: self.model.x0(x, self.schedule.t_min, **(self.cond or {}))}

    def distance_of(self, samples: Tensor) -> float:
        """On the features of the shipped classifier, from the training set's statistics."""
        judge = digit_judge("cpu")
        return frechet_distance(Moments.of(judge.features(samples)), judge.reference)


@dataclass
class Problem(Trajectories):
    """A mixture seen through a schedule, with start noise and the exact ends of its trajectories.

    Attributes:
        schedule: one of `SCHEDULES`.
        dim: of the mixture, `GaussianMixture.random(dim)`.
        samples: how many trajectories.
    """

    schedule: Schedule
    dim: int
    samples: int

    @cached_property
    def mixture(self) -> GaussianMixture:
        """The data."""
        return GaussianMixture.random(self.dim)

    @cached_property
    def model(self) -> EpsModel:  # type: ignore[override]  # computed at first use
        """The exact one."""
        return EpsModel(self.mixture.net(self.schedule), self.schedule)

    @cached_property
    def noise(self) -> Tensor:  # type: ignore[override]
        """Standard-normal start noise, (samples, dim)."""
        return torch.randn(self.samples, self.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    @cached_property
    def solution(self) -> dict[bool, Tensor]:  # type: ignore[override]
        """Where the trajectories from `sigma(t_max) noise` are at t_min (False) and at clean data (True).

        By DOP853 on `dy / d sigma_bar = eps(y)`, `y = x / alpha`, to 1e-10; down to sigma_bar = 0 the mixture is smooth.
        """
        from scipy.integrate import solve_ivp

        first, last = (float(self.schedule.sigma_bar(t)) for t in (self.schedule.t_max, self.schedule.t_min))

        def slope(sigma: float, y: np.ndarray) -> np.ndarray:
            return self.mixture.eps(torch.from_numpy(y).view_as(self.noise), 1.0, max(sigma, 0.0)).numpy().ravel()

        start = first * self.noise.numpy().ravel()
        ends = {"t_eval": [last, 0.0], "method": "DOP853", "rtol": _TOLERANCE, "atol": _TOLERANCE}
        at_end, clean = (
            torch.from_numpy(y).view_as(self.noise) for y in solve_ivp(slope, (first, 0.0), start, **ends).y.T
        )
        return {False: float(self.schedule.alpha(self.schedule.t_min)) * at_end, True: clean}

    def distance_of(self, samples: Tensor) -> float:
        """From the mixture's exact mean and covariance."""
        return gaussian_frechet(self.mixture, samples)


def fixed_samplers(stochastic: bool = False) -> list[str]:
    """Every sampler whose plan uses no noise by default, or every one whose plan does.

    Error-controlled samplers have no plan, and consistency sampling is for models that were trained for it.
    """
    fixed = [s.name for s in list_samplers() if not s.adaptive and s.name != "consistency"]
    return [name for name in fixed if uses_noise(name) == stochastic]


def sweep(
    samplers: Sequence[str],
    grids: Sequence[str],
    budgets: Sequence[int],
    problems: Sequence[Trajectories],
    distance: bool = False,
) -> pd.DataFrame:
    """One row for each sampler, grid, budget and problem that go together: with the calls used and the error, or the distance.

    A budget below one step, or a grid that a schedule does not allow, is no row.
    """
    return pd.DataFrame(list(_rows(samplers, grids, budgets, problems, distance)))


def _rows(
    samplers: Sequence[str],
    grids: Sequence[str],
    budgets: Sequence[int],
    problems: Sequence[Trajectories],
    distance: bool,
) -> Iterator[dict[str, Any]]:
    for problem in problems:
        for grid in (name for name in grids if allows(problem.schedule, name)):
            for sampler in samplers:
                for nfe in budgets:
                    try:
                        plan = make_plan(sampler, problem.schedule, nfe=nfe, grid=grid)
                    except ValueError:
                        continue
                    row = {"sampler": sampler, "grid": grid, "schedule": problem.schedule.name, "dim": problem.dim}
                    error = problem.error(plan, distance)  # a stochastic sampler's plan of one step may use no noise
                    yield {**row, "nfe": nfe, "calls": plan.nfe, "steps": plan.steps, "error": error}


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """For each sampler and grid, the geometric mean of its error over the sampler's best in the same cell: (samplers, grids).

    A grid that has no row in some cell of a sampler has no mean there.
    """
    best = rows.groupby(["sampler", *CELL])["error"].transform("min")
    logs = rows.assign(ratio=np.log(rows["error"] / best))
    table = logs.pivot_table(index="sampler", columns="grid", values="ratio", aggfunc="mean", sort=False)
    count = rows.pivot_table(index="sampler", columns="grid", values="error", aggfunc="size", sort=False)
    return np.exp(table.where(count.eq(count.max(axis=1), axis=0)))


def markdown(rows: pd.DataFrame, title: str = "Grids on Gaussian mixtures", measure: str = _RMSE) -> str:
    """The best grid of each sampler, how far the recommended one is from it, and the whole table of ratios."""
    table, budgets = ratios(rows), sorted(rows["nfe"].unique())
    lines = [
        f"# {title}",
        "",
        f"{measure}; schedules {_listed(rows['schedule'])}; dimensions "
        f"{_listed(rows['dim'])}; NFE {_listed(rows['nfe'])}. A ratio is the geometric mean, over schedules, dimensions and "
        "budgets, of the error on a grid over the sampler's smallest error on any grid: 1 is best everywhere.",
        "",
        _line(
            ["sampler", "best grid", "ratio", "next", "ratio", "recommended", "ratio", *(f"NFE {n}" for n in budgets)]
        ),
        _line(["---"] * (7 + len(budgets))),
    ]
    by_budget = {n: ratios(rows[rows["nfe"] == n]).fillna(math.inf).idxmin(axis=1) for n in budgets}
    for sampler, row in table.iterrows():
        order, own = row.dropna().sort_values(), get_sampler(str(sampler)).grid
        first, second = [*zip(order.index, order, strict=True), ("", math.nan)][:2]
        cells = [first[0], _number(first[1]), second[0], _number(second[1]), own, _number(row.get(own, math.nan))]
        lines.append(_line([str(sampler), *cells, *(str(by_budget[n].get(sampler, "")) for n in budgets)]))
    lines += ["", "## Every grid", "", _line(["sampler", *table.columns]), _line(["---"] * (1 + len(table.columns)))]
    lines += [_line([str(sampler), *map(_number, row)]) for sampler, row in table.iterrows()]
    means = np.exp(np.log(table).mean())
    return "\n".join([*lines, _line(["**all**", *map(_number, means)]), ""])


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, values.unique()))


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _chosen(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = list(known) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise click.BadParameter(str(unknown(option, name, known)))
    return names


@click.command()
@click.option("--samplers", help="Names separated by commas; by default every deterministic one, or stochastic one.")
@click.option("--stochastic", is_flag=True, help="Stochastic samplers, by the distance of their samples from the data.")
@click.option("--grids", help="Names separated by commas; by default all.")
@click.option("--schedules", "on", help=f"Names separated by commas, of {', '.join(SCHEDULES)}; by default all.")
@click.option("--nfe", multiple=True, type=click.IntRange(min=1), default=(5, 8, 10, 20), show_default=True)
@click.option("--dim", multiple=True, type=click.IntRange(min=1), default=(2, 16), show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    help="Trajectories of each problem; by default 64, and 1024 for a distance.",
)
@click.option(
    "--model", type=click.Choice(["gmm", "mnist"]), default="gmm", show_default=True, help="mnist has its own schedule."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=_OUT,
    show_default=True,
    help="Folder of MODEL.csv and MODEL.md, or of MODEL-stochastic.csv and .md.",
)
def main(
    samplers: str | None,
    stochastic: bool,
    grids: str | None,
    on: str | None,
    nfe: tuple[int, ...],
    dim: tuple[int, ...],
    samples: int | None,
    model: str,
    out: Path,
) -> None:
    """Measure samplers on grids; write a CSV with a row for each cell, and the best grid of each sampler as Markdown."""
    began = time.process_time()
    samples = samples or (1024 if stochastic else 64)
    problems: list[Trajectories] = [Digits(samples)]
    if model == "gmm":
        problems = [Problem(SCHEDULES[s], d, samples) for s in _chosen("schedule", on, list(SCHEDULES)) for d in dim]
    names = _chosen("sampler", samplers, fixed_samplers(stochastic))
    rows = sweep(names, _chosen("grid", grids, list(GRIDS)), nfe, problems, stochastic)
    if rows.empty:
        raise click.UsageError("no sampler, grid and budget of these go together")
    title = "Grids on Gaussian mixtures" if model == "gmm" else "Grids on the shipped MNIST model"
    measure = f"Frechet distance of {samples} samples from the data" if stochastic else _RMSE
    name = f"{model}-stochastic" if stochastic else model
    write_text(out / f"{name}.csv", rows.to_csv(index=False, float_format="%.6g"))
    write_text(out / f"{name}.md", markdown(rows, title, measure))
    made = {"samples": samples, "measure": measure, **machine("cpu"), "cpu_seconds": round(time.process_time() - began)}
    write_text(out / f"{name}.provenance.json", json.dumps(made, indent=1) + "\n")
    click.echo(f"{len(rows)} cells: {out / f'{name}.csv'}, {out / f'{name}.md'}")


if __name__ == "__main__":
    main()
