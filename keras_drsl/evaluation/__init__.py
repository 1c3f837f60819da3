"""How robust a model is, and evidence for or against the answer."""

from keras_drsl.evaluation.checks import Outcome, check, grade
from keras_drsl.evaluation.compare import Comparison, Difference, compare
from keras_drsl.evaluation.context import EvaluationContext
from keras_drsl.evaluation.corruptions import CORRUPTIONS, CorruptionReport, corrupt, evaluate_corruptions
from keras_drsl.evaluation.curve import RobustnessCurve, robustness_curve
from keras_drsl.evaluation.distances import MinimalDistances, minimal_distances
from keras_drsl.evaluation.evaluate import evaluate_robustness
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.evaluation.results import Check

__all__ = [
    "CORRUPTIONS",
    "Check",
    "Comparison",
    "CorruptionReport",
    "Difference",
    "EvaluationContext",
    "MinimalDistances",
    "Outcome",
    "RobustnessCurve",
    "RobustnessReport",
    "check",
    "compare",
    "corrupt",
    "evaluate_corruptions",
    "evaluate_robustness",
    "grade",
    "minimal_distances",
    "robustness_curve",
]
