"""The model as attacks see it: logits of one input, and the programs compiled for them."""

from keras_drsl.models.classifier import Classifier, is_misclassified, margins
from keras_drsl.models.fingerprint import fingerprint
from keras_drsl.models.logits import LogitsModel, find_logits

__all__ = ["Classifier", "LogitsModel", "find_logits", "fingerprint", "is_misclassified", "margins"]
