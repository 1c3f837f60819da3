"""Classifiers that withstand attack, for Keras 3: losses, metrics, attacks."""

from keras_drsl.losses import DRSLoss, drs_loss, linear_drs_loss
from keras_drsl.metrics import SoftmaxDiversity, softmax_diversity

__version__ = "0.1.0"

__all__ = ["DRSLoss", "SoftmaxDiversity", "drs_loss", "linear_drs_loss", "softmax_diversity"]
