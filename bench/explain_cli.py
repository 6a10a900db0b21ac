"""The command that says where two samplers part: `fewstep explain`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from bench.command import plain_errors, wide_console
from bench.export_cli import SCHEDULE_HELP, options_in

if TYPE_CHECKING:
    from bench.explain import Explanation

_SHOWN = 50  # steps in a table


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--schedule", default="sd15", show_default=True, help=SCHEDULE_HELP)
@click.option("--grid", help="Nodes of samplers, by name; by default those that each recommends.")
@click.option("--same-nodes", is_flag=True, help="A sampler takes the nodes of the scheduler that it is compared with.")
@click.option("--set-a", "set_a", multiple=True, metavar="NAME=VALUE", help="Option or setting of A; repeatable.")
@click.option("--set-b", "set_b", multiple=True, metavar="NAME=VALUE", help="Option or setting of B; repeatable.")
@click.option("--tolerance", type=float, default=1e-9, show_default=True, help="Relative; 1e-4 forgives float32.")
@plain_errors
def explain(a: str, b: str, set_a: tuple[str, ...], set_b: tuple[str, ...], schedule: str, **how: Any) -> None:
    """Say where the samplers A and B part: node, time, order, final step, noise or dtype, with numbers.

    Each is a sampler (dpmpp-2m), diffusers:CLASS (PlanScheduler too), k-diffusion:FUNCTION, MODULE:FUNCTION of k-diffusion's
    form, or an exported plan.json. Exit code 1 where they part.
    """
    from bench.explain import explain as run
    from bench.explain_space import Side
    from bench.export import named_noise

    if "" not in sys.path:
        sys.path.append("")  # MODULE:FUNCTION may lie in this folder
    sides = Side(a, options_in("--set-a", set_a)), Side(b, options_in("--set-b", set_b))
    found = run(*sides, named_noise(schedule), **how)
    click.echo(f"A: {_described(sides[0])}, {found.a.calls} network calls, {found.a.noises} noises")
    click.echo(f"B: {_described(sides[1])}, {found.b.calls} network calls, {found.b.noises} noises")
    _show(found)
    if found.on_same_nodes is not None:
        click.echo("\nWith both on the same nodes:")
        _show(found.on_same_nodes)
    if found.part is not None:
        raise SystemExit(1)


def _described(side: Any) -> str:
    return " ".join([side.name, *(f"{name}={value}" for name, value in side.options.items())])


def _show(found: Explanation) -> None:
    if found.part is None:
        click.echo(f"the same: no coefficient differs by more than {found.difference:.1e}")
        return
    where = f"step {found.part.step} of {len(found.a.nodes) - 1}" if found.part.step else "the start"
    click.echo(f"they part at {where}: {found.part.cause}. {found.part.text}")
    if found.beyond is not None:
        click.echo(f"apart from that, at step {found.beyond.step}: {found.beyond.cause}. {found.beyond.text}")
    elif found.part.cause == "time":
        click.echo(f"apart from that they are the same: no coefficient differs by more than {found.difference:.1e}")
    if found.part.cause not in ("dtype", "time", "calls") or found.beyond is not None:
        _table(found)


def _table(found: Explanation) -> None:
    """The largest difference of each step."""
    from rich.table import Table

    worst: dict[int, float] = {}
    for step, difference in found.steps:
        worst[step] = max(worst.get(step, 0.0), difference)
    table = Table("step", "sigma A", "sigma B", "largest difference of a coefficient", title="In float64")
    rows = list(worst.items())
    skipped = max(0, len(rows) - _SHOWN)
    for step, difference in rows[:_SHOWN]:
        nodes = [f"{each.sigmas[step]:.6g}" if step < len(each.sigmas) else "" for each in (found.a, found.b)]
        table.add_row(str(step), *nodes, f"{difference:.1e}")
    wide_console().print(table)
    if skipped:
        click.echo(f"and {skipped} more steps")
