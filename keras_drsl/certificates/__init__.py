"""Proofs of robustness: radii within which no attack can succeed."""

from keras_drsl.certificates.intervals import certify_interval, interval_bounds
from keras_drsl.certificates.report import CertificateReport
from keras_drsl.certificates.smoothed import SmoothedClassifier
from keras_drsl.certificates.smoothing import certify

__all__ = ["CertificateReport", "SmoothedClassifier", "certify", "certify_interval", "interval_bounds"]
