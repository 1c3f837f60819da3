"""Measure whether the suite "standard" is as strong as AutoAttack: the verdicts of both, example by example.

Three models of digits (cross-entropy, DRSLoss, adversarially trained) are attacked by this package, and by
torchattacks' AutoAttack on a copy in torch with the same weights. It prints both robust accuracies, and on how many
examples only one of them succeeded. About ten minutes on two cores; needs `pip install ".[rivals]"` and
`pip install --no-deps torchattacks`.

    python -m benchmarks.second_opinion --out results
"""

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import numpy as np
import torch

import keras_drsl
from benchmarks import rivals
from keras_drsl import datasets
from keras_drsl.models import Classifier
from keras_drsl.models.classifier import is_misclassified

EPS = 0.15
MOST_POINTS = 0.5  # by how much ours may be the higher


def judge(kind, train, x, y, epochs):
    """Both verdicts on one model."""
    model = rivals.train(kind, *train, epochs=epochs, eps=EPS)
    report = keras_drsl.evaluate_robustness(model, x, y, eps=EPS, verbose=0)
    # What the checks broke beyond the suite does not count here.
    ours = np.array([name is None or name.startswith("check:") for name in report.per_example["broken_by"]])
    copy = rivals.torch_copy(model)
    classifier = Classifier(model)
    x_adv = rivals.torchattacks_autoattack(copy, x, y, EPS)
    # Its points are tried on the model itself, and must lie in the ball.
    if np.abs(x_adv.astype("float64") - x).max() > EPS + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise AssertionError("torchattacks left the ball")
    # What rounding makes of a point between copy and model is not held against AutoAttack.
    with torch.no_grad():
        by_copy = copy(rivals.to_torch(x_adv)).numpy()
    theirs = ~(is_misclassified(classifier.logits(x_adv), y) | is_misclassified(by_copy, y))
    row = {
        "model": kind,
        "images": len(x),
        "eps": EPS,
        "clean_accuracy": report.clean_accuracy,
        "ours": float(ours.mean()),
        "autoattack": float(theirs.mean()),
        "only_ours_broke": int((theirs & ~ours).sum()),
        "only_autoattack_broke": int((ours & ~theirs).sum()),
        "checks": {check.name: check.status for check in report.checks},
    }
    print({key: value for key, value in row.items() if key != "checks"}, flush=True)
    return row


def main():
    train, (x, y) = datasets.load("digits")
    count, epochs = (16, 1) if ARGS.quick else (len(x), 30)
    x, y = x[:count], y[:count].astype("int64")
    rows = [judge(kind, train, x, y, epochs) for kind in ("ce", "drs", "adversarial")]
    targets = [
        {
            "name": f"{row['model']}: robust accuracy, ours - AutoAttack, points",
            "value": 100 * (row["ours"] - row["autoattack"]),
            "target": MOST_POINTS,
        }
        for row in rows
    ]
    measure.write(ARGS, "second_opinion", {"rows": rows, "targets": measure.verdict(targets)}, {"torchattacks"})


if __name__ == "__main__":
    main()
