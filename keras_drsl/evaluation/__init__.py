"""How robust a model is, and reasons to believe the answer."""

from keras_drsl.evaluation.curve import RobustnessCurve, robustness_curve
from keras_drsl.evaluation.evaluate import evaluate_robustness
from keras_drsl.evaluation.head import find_logits
from keras_drsl.evaluation.report import Check, RobustnessReport

__all__ = ["Check", "RobustnessCurve", "RobustnessReport", "evaluate_robustness", "find_logits", "robustness_curve"]
