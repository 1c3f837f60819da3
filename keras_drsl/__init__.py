"""Classifiers that withstand attack, for Keras 3: losses, metrics, attacks, and an honest evaluation."""

from keras_drsl.callbacks import RobustnessMonitor
from keras_drsl.evaluation import RobustnessCurve, RobustnessReport, evaluate_robustness, robustness_curve
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
from keras_drsl.training import AdversarialTraining

__version__ = "0.1.0"

__all__ = [
    "AdversarialTraining",
    "ComplementObjective",
    "DRSLoss",
    "GuidedComplementEntropy",
    "LogitSqueezing",
    "PRSLoss",
    "ProbabilisticallyCompactLoss",
    "RobustnessCurve",
    "RobustnessMonitor",
    "RobustnessReport",
    "SoftmaxDiversity",
    "Squentropy",
    "ZLoss",
    "drs_loss",
    "evaluate_robustness",
    "linear_drs_loss",
    "prs_loss",
    "robustness_curve",
    "softmax_diversity",
]
