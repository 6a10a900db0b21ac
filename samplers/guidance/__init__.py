"""What changes the model and not the sampler: functions from an epsilon-model to an epsilon-model."""

from samplers.guidance.threshold import clip, threshold

__all__ = ["clip", "threshold"]
