"""Exported plans: the published schema, and the reference executor of the documentation against the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import samplers
from samplers import list_samplers, make_plan, run_plan, schedules
from samplers.plan import Plan

VP = schedules.vp_linear()
ROOT = Path(samplers.__file__).parent
DOCS = ROOT.parent / "docs" / "plans.md"
every_sampler = pytest.mark.parametrize("name", [s.name for s in list_samplers() if not s.adaptive])


@pytest.fixture(scope="module")
def documented():
    """The function `run` of the documentation."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "def run(" in block)
    body = [line for line in code.split("def run(")[1].splitlines() if line.strip()]
    assert len(body) <= 30
    names = {}
    exec(compile(code, str(DOCS), "exec"), names)
    return names["run"]


@every_sampler
@pytest.mark.parametrize("final", ["t_min", "zero"])
def test_the_documented_executor_gives_the_same(documented, exact, mixture, name, final):
    plan = make_plan(name, VP, steps=6, final=final)
    x_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noises = torch.randn(plan.noises, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = run_plan(plan, exact(VP), x_T, noise_source=lambda k, like: noises[k])

    def eps(x, t):
        return exact(VP)(torch.from_numpy(x), t).numpy()

    got = documented(plan.to_json(), eps, x_T.numpy(), lambda k: noises[k].numpy())
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-12)


@every_sampler
def test_plans_fit_the_published_schema_and_read_back_to_the_same_bits(name):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "plan.schema.json").read_text())
    plan = make_plan(name, VP, steps=5)
    jsonschema.validate(json.loads(plan.to_json()), schema)
    assert Plan.from_json(plan.to_json()) == plan
    broken = json.loads(plan.to_json())
    broken["instructions"][0]["kind"] = "noise"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_another_version_is_refused(documented):
    text = make_plan("ddim", VP, steps=2).to_json().replace('"version": 1', '"version": 2')
    with pytest.raises(ValueError, match="version 1"):
        documented(text, None, np.zeros(2), None)
    with pytest.raises(ValueError, match="version 1"):
        Plan.from_json(text)
