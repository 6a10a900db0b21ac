"""What changes the model and not the sampler: functions from an epsilon-model to an epsilon-model."""

from samplers.guidance.classifier_free import classifier_free
from samplers.guidance.threshold import clip, threshold

__all__ = ["classifier_free", "clip", "threshold"]
