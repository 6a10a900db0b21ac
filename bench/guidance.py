"""Guidance as a suite describes it: which kind, how much of it, and the model that comes out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator
from torch import Tensor

from bench.network import Network, model_hash
from distill.documents import Strict
from samplers import EpsModel, Plan, guidance
from samplers.errors import unknown
from samplers.guidance.guided import Guided
from samplers.program import Evaluate

NOT_GUIDED = ("time_ids", "guidance", "resolution", "aspect_ratio")  # conditions that a prompt does not change
Null = Mapping[str, Tensor]
Weaker = Callable[[str], Network]
_Network = TypeVar("_Network", bound=Network)


class Guidance(Strict, ABC):
    """What every kind has.

    Attributes:
        scale: 1 is no guidance. A network that takes a weight, as guided students do, is given `scale - 1`.
        interval: [low, high] in `sigma_bar = sigma / alpha`; guidance inside of it only.
        batched: whether the predictions at a state come from one call or from one each.
    """

    points: ClassVar[int] = 2  # evaluations of a sample at a point under guidance
    needs_null: ClassVar[bool] = True
    kind: str
    scale: float
    interval: tuple[float, float] | None = None
    batched: bool = True

    @field_validator("interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1]:
            raise ValueError(f"must be [low, high] in sigma_bar with 0 <= low < high, got {list(value)}")
        return value

    @property
    def text(self) -> str:
        """The kind with all that is not at its default: what a row says, and what identifies it."""
        given = {name: value for name, value in self.model_dump(exclude_defaults=True).items() if name != "kind"}
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in given.items())})"

    def active(self, call: Evaluate) -> bool:
        """Whether a call of a plan is under guidance."""
        level = call.sigma / call.alpha if call.alpha else float("inf")
        return self.scale != 1 and (self.interval is None or self.interval[0] < level <= self.interval[1])

    def evaluations(self, plan: Plan) -> tuple[int, int]:
        """Evaluations of a sample by a plan, and how many of them are at points under guidance."""
        guided = sum(map(self.active, plan.calls))
        return plan.nfe + (self.points - 1) * guided, self.points * guided

    @abstractmethod
    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model under guidance.

        Args:
            model: conditional.
            null: its null condition.
            plan: that will be run; None for a sampler without one.
            weaker: loads a model by name.
        """

    @property
    def how(self) -> dict[str, Any]:
        """Arguments that are those of every function of `samplers.guidance`."""
        return {"interval": self.interval, "batched": self.batched}


class ClassifierFree(Guidance):
    """Classifier-free guidance; see `samplers.guidance.classifier_free`."""

    kind: Literal["cfg"] = "cfg"
    rescale: float = Field(default=0.0, ge=0, le=1)

    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model under guidance."""
        return guidance.classifier_free(model, self.scale, null, rescale=self.rescale, **self.how)

    @property
    def weight(self) -> float | None:
        """The weight of a network that takes one, which knows no interval and no rescaling."""
        return self.scale - 1 if self.interval is None and not self.rescale else None


class Projected(Guidance):
    """Adaptive projected guidance; see `samplers.guidance.apg`."""

    kind: Literal["apg"] = "apg"
    eta: float = 0.0
    norm_threshold: float | None = Field(default=None, gt=0)
    momentum: float = 0.0

    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model under guidance."""
        longest = math.inf if self.norm_threshold is None else self.norm_threshold
        own = {"eta": self.eta, "norm_threshold": longest, "momentum": self.momentum}
        return guidance.apg(model, self.scale, null, **own, **self.how)  # type: ignore[arg-type]


class PlusPlus(Guidance):
    """CFG++ on the grid of each plan; see `samplers.guidance.cfg_plus_plus`. Its scale is lambda, and 1 is guidance too."""

    kind: Literal["cfg++"] = "cfg++"
    scale: float = Field(gt=0)
    interval: None = None

    def active(self, call: Evaluate) -> bool:
        """Everywhere."""
        return True

    def evaluations(self, plan: Plan) -> tuple[int, int]:
        """Two at each point, but where the scale of a step happens to be that of no guidance."""
        return 2 * plan.nfe, 2 * plan.nfe

    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model under guidance for the plan's grid."""
        if plan is None:
            raise ValueError("guidance kind 'cfg++' goes with the steps of a grid, and this sampler chooses its own")
        return guidance.cfg_plus_plus(model, self.scale, null, plan, batched=self.batched)


class Autoguidance(Guidance):
    """Guidance away from a weaker model; see `samplers.guidance.autoguidance`.

    Attributes:
        weaker: a name of the zoo, or a folder.
    """

    needs_null: ClassVar[bool] = False
    kind: Literal["autoguidance"] = "autoguidance"
    weaker: str
    batched: Literal[False] = False

    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model under guidance."""
        return guidance.autoguidance(model, weaker(self.weaker).model, self.scale, interval=self.interval)


class Unguided(Guidance):
    """None, for a row of a suite that has guidance for all."""

    needs_null: ClassVar[bool] = False
    kind: Literal["none"] = "none"
    scale: Literal[1] = 1
    interval: None = None

    def on(self, model: EpsModel, null: Null, plan: Plan | None, weaker: Weaker) -> EpsModel:
        """The model itself."""
        return model


KINDS = ("cfg", "apg", "cfg++", "autoguidance", "none")


def _tag(value: Any) -> str:
    return f"({value.get('kind', 'cfg') if isinstance(value, dict) else getattr(value, 'kind', 'weight')})"


def _known(value: Any) -> Any:
    if isinstance(value, dict) and value.get("kind", "cfg") not in KINDS:
        raise unknown("guidance kind", value["kind"], KINDS)
    return value


GuidanceSpec = Annotated[
    Annotated[float, Tag("(weight)")]
    | Annotated[ClassifierFree, Tag("(cfg)")]
    | Annotated[Projected, Tag("(apg)")]
    | Annotated[PlusPlus, Tag("(cfg++)")]
    | Annotated[Autoguidance, Tag("(autoguidance)")]
    | Annotated[Unguided, Tag("(none)")],
    Discriminator(_tag),
    BeforeValidator(_known),
]


def weight_of(given: float | Guidance | None) -> float | None:
    """The weight for a network that takes one; None is no guidance.

    Raises:
        ValueError: guidance of a kind that is no weight.
    """
    if given is None or isinstance(given, Unguided):
        return None
    if not isinstance(given, Guidance):
        return given
    weight = given.weight if isinstance(given, ClassifierFree) else None
    if weight is None:
        raise ValueError(
            f"guidance must be a weight, or kind cfg with a scale alone, for a network that takes a weight; got {given.text}"
        )
    return weight


def null_of(network: Network) -> dict[str, Tensor]:
    """The null condition of a network, with one row.

    Raises:
        ValueError: there is none, or the network never saw it.
    """
    if network.info.get("training", {}).get("drop_label") == 0:
        raise ValueError(
            f"guidance needs a null condition, and model {network.name} was trained with drop_label=0: without a label it has "
            "no prediction"
        )
    try:
        return {name: value for name, value in network.null(1).items() if name not in NOT_GUIDED}
    except ValueError as error:
        raise ValueError(f"guidance needs a null condition: {error}") from error


def guided(network: _Network, spec: Guidance, plan: Plan | None, weaker: Weaker) -> _Network:
    """The network under guidance.

    Args:
        network: not guided yet.
        spec: what guidance.
        plan: that will be run; None for a sampler without one.
        weaker: loads a model by name, on the network's device; what it loads is part of the hash of what comes out.

    Raises:
        ValueError: a network without a null condition, or guided already, or guidance that the plan does not allow.
    """
    if isinstance(network.model, Guided):
        raise ValueError(f"guidance={spec.text} is given for a model that has guidance already; give guidance or scale")
    null = null_of(network) if spec.needs_null else {}
    both = replace(network, model=spec.on(network.model, null, plan, weaker))
    if not isinstance(spec, Autoguidance):
        return both
    return replace(both, hash=model_hash({}, {"network": network.hash, "weaker": weaker(spec.weaker).hash}))
