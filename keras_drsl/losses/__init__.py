"""Losses, one a file."""

from keras_drsl.losses.base import ClassificationLoss
from keras_drsl.losses.complement_objective import ComplementObjective
from keras_drsl.losses.drs import DRSLoss, drs_loss
from keras_drsl.losses.guided_complement_entropy import GuidedComplementEntropy
from keras_drsl.losses.linear_drs import linear_drs_loss
from keras_drsl.losses.logit_squeezing import LogitSqueezing
from keras_drsl.losses.probabilistically_compact import ProbabilisticallyCompactLoss
from keras_drsl.losses.prs import PRSLoss, prs_loss
from keras_drsl.losses.squentropy import Squentropy
from keras_drsl.losses.z_loss import ZLoss

__all__ = [
    "ClassificationLoss",
    "ComplementObjective",
    "DRSLoss",
    "GuidedComplementEntropy",
    "LogitSqueezing",
    "PRSLoss",
    "ProbabilisticallyCompactLoss",
    "Squentropy",
    "ZLoss",
    "drs_loss",
    "linear_drs_loss",
    "prs_loss",
]
