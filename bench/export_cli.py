"""The command that writes a sampler's plan for other programs: `fewstep export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench.command import plain_errors

SCHEDULE_HELP = "Name of a noise schedule (sd15, sdxl, sd3, edm, ...) or path of a scheduler_config.json."


@click.command()
@click.argument("sampler")
@click.option("--steps", type=click.IntRange(min=1), help="Steps; or give --nfe.")
@click.option("--nfe", type=click.IntRange(min=1), help="Network calls that a sample may take.")
@click.option("--schedule", required=True, help=SCHEDULE_HELP)
@click.option(
    "--grid", help="Nodes by name (karras, trailing, ays, ...); by default those that the sampler recommends."
)
@click.option("--final", help="t_min, zero or denoise: how the last step ends; by default the grid's own.")
@click.option("--shift", type=float, help="Of a flow model's nodes; by default the model's own.")
@click.option(
    "--option", "pairs", multiple=True, metavar="NAME=VALUE", help="Of the sampler, such as eta=0.5; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file; by default standard output.")
@plain_errors
def export(
    sampler: str, schedule: str, shift: float | None, pairs: tuple[str, ...], out: Path | None, **where: Any
) -> None:
    """Write the plan of SAMPLER as JSON: its sigmas as a list, and every coefficient.

    The list `sigmas` goes into schedulers that accept their own (diffusers' set_timesteps, ComfyUI's custom sigmas).
    """
    import json

    from bench.export import document, named_noise, plan_for
    from samplers.schedule import Flow

    noise = named_noise(schedule)
    if shift is not None:
        if not isinstance(noise.schedule, Flow):
            raise ValueError(f"--shift is for flow models, and schedule {schedule!r} is none")
        if where["grid"] is not None:
            raise ValueError("--shift makes the nodes itself: give it or --grid")
        noise = noise._replace(shift=shift)
    plan = plan_for(sampler, noise, **where, **options_in("--option", pairs))
    text = json.dumps(document(plan, noise.schedule), allow_nan=False)
    if out is None:
        click.echo(text)
        return
    from bench.store import write_text

    write_text(out, text + "\n")
    click.echo(f"{plan.sampler}: {plan.steps} steps, {plan.nfe} network calls -> {out}")


def options_in(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is what YAML makes of it, so that numbers and true are what they seem.

    Raises:
        ValueError: a pair without a name or "=", or a name given twice.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ValueError(f"{option} takes NAME=VALUE, got {pair!r}")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{option} {name}: {value!r} is not a value") from error
    return found
