"""What changes the model and not the sampler: functions from an epsilon-model to an epsilon-model."""

from samplers.guidance.classifier_free import cfg_plus_plus, classifier_free
from samplers.guidance.other_models import autoguidance, classifier
from samplers.guidance.projected import apg, perp_neg
from samplers.guidance.threshold import clip, threshold

__all__ = ["apg", "autoguidance", "cfg_plus_plus", "classifier", "classifier_free", "clip", "perp_neg", "threshold"]
