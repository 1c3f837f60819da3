"""Classifiers that withstand attacks, for Keras 3: losses, metrics, attacks, adversarial training, evaluation."""

from keras_drsl import _renamed
from keras_drsl import attacks as attacks
from keras_drsl import certificates as certificates
from keras_drsl import datasets as datasets
from keras_drsl import models as models
from keras_drsl.callbacks import RobustnessMonitor
from keras_drsl.certificates import CertificateReport, SmoothedClassifier, certify
from keras_drsl.evaluation import (
    Comparison,
    CorruptionReport,
    MinimalDistances,
    RobustnessCurve,
    RobustnessReport,
    compare,
    evaluate_corruptions,
    evaluate_robustness,
    minimal_distances,
    robustness_curve,
)
from keras_drsl.losses import (
    BilateralSoftmaxLoss,
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
    "BilateralSoftmaxLoss",
    "CertificateReport",
    "Comparison",
    "ComplementObjective",
    "CorruptionReport",
    "DRSLoss",
    "GuidedComplementEntropy",
    "LogitSqueezing",
    "MinimalDistances",
    "PRSLoss",
    "ProbabilisticallyCompactLoss",
    "RobustnessCurve",
    "RobustnessMonitor",
    "RobustnessReport",
    "SmoothedClassifier",
    "SoftmaxDiversity",
    "Squentropy",
    "ThreatModel",
    "ZLoss",
    "certify",
    "compare",
    "drs_loss",
    "evaluate_corruptions",
    "evaluate_robustness",
    "linear_drs_loss",
    "minimal_distances",
    "prs_loss",
    "robustness_curve",
    "softmax_diversity",
]

_renamed.refuse_old_imports()
