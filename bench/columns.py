"""The columns of table.csv and of the frame that `bench.run` returns, in words."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = ("_low", "_high", "_standard_error", "_reason", "_model_value")  # of the columns beside `<metric>`
COLUMNS = {
    "role": "`sampler` of a row of the suite, student or not; `teacher` of the many-step run",
    "label": "how the table calls the row",
    "model": "name of the network's model",
    "sampler": "registered name; `student` of one that is sampled as it was trained",
    "options": "the sampler's options, defaults included",
    "grid": "name of the time grid",
    "final": "the last step: `t_min`, `zero` or `denoise`; empty for a student, whose plan is in its folder",
    "afs": "whether the first step is analytical",
    "model_hash": "of the network's weights and what they are read with",
    "budget": "network calls that a sample may take",
    "plan_hash": "of the plan, which is the sampler's exact definition; empty where it has none",
    "num_samples": "samples behind the figures",
    "seed": "of all noise",
    "metric": "name of the distance in `value`",
    "dtype": "the network's",
    "device": "kind of device",
    "torch": "its version",
    "code": "hash of the source files that can change a figure",
    "inputs_<name>": "what the network takes beside state, time and label",
    "guidance": "kind and scale",
    "further": "metrics beside the distance",
    "plugins": "hash of the code of metrics and samplers of installed packages",
    "solution": "key of the many-step run that the row is compared with",
    "integrators": "versions of what chooses the steps of an error-controlled sampler",
    "hashes_<part>": "of the judge's extractor, reference and reference samples",
    "status": "`done`, `failed`, `absent` (the sampler needs more calls than the budget, or no student was trained for it) or "
    "`missing` (left to another shard)",
    "reason": "why it is not done",
    "nfe": "network calls that a sample took",
    "evaluations": "of the network for a sample, of which guidance may make two at a call",
    "sequential_calls": "sequential depth: calls that wait for each other",
    "guided_evaluations": "those of the evaluations that are under guidance",
    "value": "the distance",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "standard_error": "of `value`",
    "label_agreement": "share of samples that the judge gives the label they were asked for",
    "model_value": "the distance of the model itself: that of the many-step run with the same seed",
    "seconds": "of sampling",
    "judging_seconds": "of features and figures",
    "images_per_second": "of sampling",
    "ms_per_image": "of sampling",
    "peak_memory_mb": "of the accelerator, or of the process where the system can reset it, else since the process began",
    "energy_joules": "of the accelerator while sampling, where NVML gives it",
    "device_name": "of the accelerator or of the processor, as it calls itself",
    "threads": "of torch on the processor",
    "processes": "that shared the cell's samples",
    "batch_size": "samples of a network call",
    "compile": "`loop` or `graph`, where it was compiled",
    "shared_first_call": "whether cells shared the answer to their first call, which makes images a second too high",
    "overlapped": "whether a batch was judged while the next one was sampled",
    "measured_at": "time, UTC",
    "trained": "of a student, whether it was trained for this budget",
    "tuned": "on what the row was tuned, where that is what judges it",
    "tuned_metrics": "the metrics that this concerns; empty for all",
    "train_images": "of a student, images of all training phases",
    "train_minutes": "of a student, minutes of all training phases",
    "train_phases": "of a student, the phases",
    "<metric>": "a further metric's value",
    "<metric>_low": "lower end of its 95 % interval",
    "<metric>_high": "upper end of its 95 % interval",
    "<metric>_standard_error": "of it",
    "<metric>_reason": "why there is no value",
    "<metric>_model_value": "that of the model itself",
}
_PREFIXES = tuple(name.partition("<")[0] for name in COLUMNS if not name.startswith("<") and "<" in name)
_SUFFIXES = tuple(name.partition(">")[2] for name in COLUMNS if name.startswith("<metric>_"))


def undocumented(columns: Iterable[str]) -> list[str]:
    """Those of the columns that nothing is said of; a further metric is one that has an interval."""
    columns = list(columns)
    metrics = {name.removesuffix("_low") for name in columns if name.endswith("_low")}
    known = {*COLUMNS, *metrics, *(f"{metric}{suffix}" for metric in metrics for suffix in _SUFFIXES)}
    return [name for name in columns if name not in known and not name.startswith(_PREFIXES)]


def markdown() -> str:
    """The columns as a table."""
    return "\n".join(["| column | what it is |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in COLUMNS.items())])
