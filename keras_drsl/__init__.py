"""Classifiers that withstand attacks, for Keras 3: losses, metrics, attacks, adversarial training, evaluation."""

from keras_drsl import _renamed
from keras_drsl import attacks as attacks
from keras_drsl import datasets as datasets
from keras_drsl import models as models
from keras_drsl.callbacks import RobustnessMonitor
from keras_drsl.evaluation import (
    Comparison,
    MinimalDistances,
    RobustnessCurve,
    RobustnessReport,
    compare,
    evaluate_robustness,
    minimal_distances,
    robustness_curve,
)
from keras_drsl.losses import (
    ComplementObjective,
    DRSLoss,
    GuidedComplementEntropy,
    LogitSqueezing,
    ProbabilisticallyCompactLoss,
    PRSLoss,
    Squentropy,
    ZLoss,
    drs_loss,
    linear_drs_loss,
    prs_loss,
)
from keras_drsl.metrics import SoftmaxDiversity, softmax_diversity
from keras_drsl.threat import ThreatModel
from keras_drsl.training import AdversarialTraining

__version__ = "0.2.0"

__all__ = [
    "AdversarialTraining",
    "Comparison",
    "ComplementObjective",
    "DRSLoss",
    "GuidedComplementEntropy",
    "LogitSqueezing",
    "MinimalDistances",
    "PRSLoss",
    "ProbabilisticallyCompactLoss",
    "RobustnessCurve",
    "RobustnessMonitor",
    "RobustnessReport",
    "SoftmaxDiversity",
    "Squentropy",
    "ThreatModel",
    "ZLoss",
    "compare",
    "drs_loss",
    "evaluate_robustness",
    "linear_drs_loss",
    "minimal_distances",
    "prs_loss",
    "robustness_curve",
    "softmax_diversity",
]

_renamed.refuse_old_imports()
