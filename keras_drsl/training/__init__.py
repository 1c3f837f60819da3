"""Adversarial training of any Keras classifier, and the parts of a training method."""

from keras_drsl.training.linear_head import LinearHeadTraining
from keras_drsl.training.methods import (
    ATTACK_LOSSES,
    METHODS,
    AttackedBatch,
    CleanBatch,
    Method,
    Outputs,
    consistency_penalty,
    cross_entropy,
    improved_kl_penalty,
    kl_divergence,
    margin,
    mart_penalty,
    trades_penalty,
)
from keras_drsl.training.safeguards import StopAtCollapse
from keras_drsl.training.trainer import AdversarialTraining

__all__ = [
    "ATTACK_LOSSES",
    "METHODS",
    "AdversarialTraining",
    "AttackedBatch",
    "CleanBatch",
    "LinearHeadTraining",
    "Method",
    "Outputs",
    "StopAtCollapse",
    "consistency_penalty",
    "cross_entropy",
    "improved_kl_penalty",
    "kl_divergence",
    "margin",
    "mart_penalty",
    "trades_penalty",
]
