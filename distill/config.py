"""What a training run is: the settings that every method shares, read from YAML and checked, and saved as YAML."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import yaml
from pydantic import Field, field_validator, model_validator

from distill.documents import Strict

CONFIGS = Path(__file__).parent / "configs"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_Run = TypeVar("_Run", bound="Training")


def default_dtype(device: str | torch.device) -> str:
    """The faster dtype of a network: "bf16" where the hardware multiplies it natively, else "fp32".

    Elsewhere bf16 is emulated: on a processor with AVX2 alone a convolution takes ten times as long as in float32.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if platform.system() == "Linux" and cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


class Training(Strict):
    """How a run is trained, whatever the method. Counts are in images, but those that say steps.

    Between two starts of one run only the fields in `may_change` may differ.

    Attributes:
        method: the registered name of what is trained; each method adds fields of its own.
        batch_size: images an optimiser step, over all processes.
        accumulate: parts that a process divides its share of a batch into, to save memory; the step stays the same.
        weight_decay: of AdamW.
        grad_clip: largest norm of the gradient.
        ema_half_lives: of the averages of the weights; the first one is judged and shipped, all are saved.
        dtype: "bf16" (autocast), "fp32", or "auto" for `default_dtype` of the device a run begins on, which it keeps.
        mirror: whether half of the images of each batch are mirrored, which suits most photographs and no writing.
        compile: whether `torch.compile` compiles the network that is trained; a teacher is not compiled.
        seed: in [0, 2^31), of the first weights and of every batch.
        log_every, save_every: steps between two rows of the log, and between two checkpoints, a multiple of the first.
        keep: checkpoints of the state that are kept, so that a damaged one costs little.
        evaluate_every: steps between two evaluations, a multiple of `log_every`; 0 for none but the last of a phase.
        rollbacks: how often in a run a loss that is NaN or Inf is answered by going back to the last checkpoint with half
            the learning rate, which lasts to the end of the phase.
        tensorboard: whether the log is also written for TensorBoard.
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"accumulate", "compile", "save_every", "keep", "evaluate_every", "rollbacks", "tensorboard"}
    )

    method: str
    batch_size: int = Field(default=128, ge=1)
    accumulate: int = Field(default=1, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    ema_half_lives: tuple[int, ...] = Field(default=(50_000,), min_length=1)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    mirror: bool = False
    compile: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    log_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    evaluate_every: int = Field(default=0, ge=0)
    rollbacks: int = Field(default=3, ge=0)
    tensorboard: bool = False

    @field_validator("ema_half_lives")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError(f"must be different and at least 1, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _whole_rows(self) -> Training:
        for name in ("save_every", "evaluate_every"):
            if getattr(self, name) % self.log_every:
                raise ValueError(f"{name} must be a multiple of log_every={self.log_every}, got {getattr(self, name)}")
        return self

    def on(self: _Run, device: str | torch.device) -> _Run:
        """These settings with the dtype for a device in place of "auto"."""
        return self if self.dtype != "auto" else self.model_copy(update={"dtype": default_dtype(device)})

    @property
    def autocast(self) -> torch.dtype:
        """The dtype that networks compute in.

        Raises:
            ValueError: it is not known before the device is; see `on`.
        """
        if self.dtype == "auto":
            raise ValueError("dtype='auto' stands for no dtype until a device is given; call on(device)")
        return DTYPES[self.dtype]

    def document(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """All fields as a YAML file that gives this run again."""
        return yaml.safe_dump(self.document(), sort_keys=False)
