"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import samplers


def test_importing_samplers_imports_torch_and_numpy_only():
    heavy = "{'diffusers', 'pandas', 'matplotlib', 'scipy', 'torchdiffeq'}"
    code = f"import sys, samplers; print(sorted({heavy} & set(sys.modules)))"
    root = samplers.__path__[0].removesuffix("samplers")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    assert all(hasattr(samplers, name) for name in samplers.__all__)
    assert {"EpsModel", "Plan", "sample", "make_plan", "run_plan", "list_samplers", "schedules", "grids"} <= set(
        samplers.__all__
    )
