"""Judge a trained MNIST model and, where it is good enough to tell samplers apart, make it the shipped one.

`python -m bench.ship_teacher --run RUN --test TEST_IMAGES`. The bar is measured on 1000 class-conditional samples at 100 DDIM
steps on the uniform grid, with the half-precision weights that are shipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.data import load_images
from bench.features import load_extractor
from bench.metrics import frechet_interval
from bench.zoo import TEACHER, BenchModel, load_model
from distill.checkpoint import load_checkpoint, save_checkpoint
from distill.config import default_dtype
from samplers import sample

COUNT = 1000


@dataclass(frozen=True)
class Verdict:
    """What was measured, and whether it meets the bar.

    Attributes:
        distance: at 100 DDIM calls.
        few_calls: at 5 DDIM calls.
        real: of as many real test images.
        label_agreement: share of samples whose label the classifier confirms.
    """

    distance: float
    few_calls: float
    real: float
    label_agreement: float

    @property
    def problems(self) -> list[str]:
        """What misses the bar, with its figure; empty where the model may ship."""
        checks = [
            (self.label_agreement >= 0.97, f"label agreement {self.label_agreement:.3f} is below 0.97"),
            (
                self.distance <= 3 * self.real,
                f"distance {self.distance:.3f} is above 3 x {self.real:.3f} of real images",
            ),
            (
                self.distance <= self.few_calls / 4,
                f"distance {self.distance:.3f} is above a quarter of {self.few_calls:.3f}",
            ),
        ]
        return [message for good, message in checks if not good]


def judge(model: BenchModel, test_images: np.ndarray) -> Verdict:
    """Measure a class-conditional model.

    Args:
        model: from the zoo.
        test_images: (N, C, H, W) uint8, N >= 1000, of which the first 1000 are used.

    Raises:
        ValueError: fewer, whose distance would be larger for their number alone.
    """
    if len(test_images) < COUNT:
        raise ValueError(f"test_images must be at least {COUNT}, got {len(test_images)}")
    distances, agreement = {}, 0.0
    for nfe in (5, 100):
        batches = torch.arange(COUNT).split(125)
        samples = torch.cat([_ddim(model, indices, nfe) for indices in batches])
        distances[nfe] = frechet_interval(model.judge.features(samples), model.judge.reference).value
        if model.judge.classify is not None:
            agreement = float(np.mean(model.judge.classify(samples) == np.arange(COUNT) % model.classes))
    extractor = load_extractor()
    real = frechet_interval(extractor.features(test_images[:COUNT]), model.judge.reference).value
    return Verdict(distances[100], distances[5], real, agreement)


def _ddim(model: BenchModel, indices: torch.Tensor, nfe: int) -> torch.Tensor:
    shape = (len(indices), *model.shape)
    return sample(model.model, "ddim", nfe=nfe, grid="uniform", shape=shape, indices=indices, cond=model.cond(indices))


def ship(run: Path, test_images: np.ndarray, out: Path, force: bool = False) -> Verdict:
    """Write the averaged weights of `run` in half precision to `out`, with what was measured.

    Raises:
        ValueError: the model misses the bar, and not `force`; what was in `out` is kept.
    """
    checkpoint = load_checkpoint(run / "model")
    candidate = run / "candidate"
    save_checkpoint(candidate, checkpoint, torch.float16)
    dtype = default_dtype("cpu")
    verdict = judge(load_model(str(candidate), dtype=dtype), test_images)
    if verdict.problems and not force:
        raise ValueError("; ".join(verdict.problems))
    judged: dict[str, Any] = {"samples": COUNT, "dtype": dtype, "torch": torch.__version__, **verdict.__dict__}
    save_checkpoint(out, replace(checkpoint, info={**checkpoint.info, "judged": judged}), torch.float16)
    return verdict


@click.command()
@click.option("--run", required=True, type=click.Path(exists=True, path_type=Path), help="Folder of `fewstep train`.")
@click.option("--test", required=True, type=click.Path(exists=True, path_type=Path), help="MNIST test images.")
@click.option("--out", default=TEACHER, show_default=True, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Ship it although it misses the bar.")
def main(run: Path, test: Path, out: Path, force: bool) -> None:
    """Judge a trained MNIST model and make it the shipped one."""
    try:
        verdict = ship(run, load_images(test).images, out, force)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps({**verdict.__dict__, "problems": verdict.problems}, indent=1))


if __name__ == "__main__":
    main()
