"""What the measurement of the Frechet distance reports, at a size at which it takes no time; no timing is judged."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from bench.metrics import Moments, frechet_interval
from bench.metrics_speed import main, write_features


def test_a_file_of_features_reads_as_its_rows(tmp_path):
    features = write_features(tmp_path / "a.bin", 2500, 6, seed=1)
    whole = np.fromfile(tmp_path / "a.bin", np.float32).reshape(2500, 6)
    assert features.shape == whole.shape
    for rows in (slice(None), slice(990, 1010), slice(2499, 9999), slice(5, 5), slice(0, 20, 3)):
        np.testing.assert_array_equal(features[rows], whole[rows])
    assert Moments.of(features).count == 2500


def test_the_report_agrees_with_torchmetrics(tmp_path):
    """The command fails where the two values differ, so that no speed is reported of something else."""
    out = tmp_path / "metrics_speed"
    run = CliRunner().invoke(main, ["--samples", "300", "--dim", "20", "--repeats", "1", "--out", str(out)])
    assert run.exit_code == 0, run.output
    report = json.loads((out / "provenance.json").read_text())
    assert {"commit", "versions", "threads", "torchmetrics_over_ours_processor"} <= set(report)
    assert report["torchmetrics_value"] == pytest.approx(report["value"], rel=1e-6)
    ours = write_features(tmp_path / "a.bin", 300, 20, seed=2, shift=0.1)
    theirs = write_features(tmp_path / "b.bin", 300, 20, seed=1)
    assert report["value"] == frechet_interval(ours, Moments.of(theirs)).value
    table = pd.read_csv(out / "table.csv")
    assert list(table["work"]) == [
        "moments of the features, one pass",
        "distance of two moments",
        "root of the reference, once",
        "distance from a reference",
        "distance with its interval, given the moments",
        "torchmetrics' compute from the same two moments",
    ]
    assert list(table.columns) == ["work", "seconds", "processor", "memory_mb"]
    text = (out / "table.md").read_text()
    assert text.startswith("# The Frechet distance of 300 x 20 features")
    assert text.count("\n| ") == 2 + len(table)
    assert f"takes {report['torchmetrics_over_ours_processor']:.1f} times the processor time" in text


def test_without_the_comparison_there_is_none():
    run = CliRunner().invoke(main, ["--samples", "50", "--dim", "4", "--no-compare"])
    assert run.exit_code == 0
    assert "torchmetrics" not in run.output
