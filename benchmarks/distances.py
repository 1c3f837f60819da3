"""Compare the curve of `minimal_distances` with that of `robustness_curve(suite="standard")`, and with adv-lib's FMN.

Four models of digits: two architectures, each trained with cross-entropy and adversarially. It prints the time of both
curves, the accuracies at six radii, and the median distances in three norms beside those of adv-lib's FMN with as many
steps, where it is installed: `pip install --no-deps adv-lib` beside torch. About 25 minutes on two cores.

    python -m benchmarks.distances --out results
"""

import time

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import importlib.util

import numpy as np
from keras import Input, Sequential, layers

import keras_drsl
from benchmarks import rivals
from keras_drsl import datasets

EPS = (0.03, 0.06, 0.09, 0.12, 0.15, 0.2)
TRAINED_EPS = 0.15
STEPS = 100
MOST_TIME, MOST_POINTS, MOST_DISTANCE = 1 / 3, 0.5, 1.01


def dense_network(shape, classes=10):
    """Return a network of dense layers that returns logits."""
    hidden = [layers.Dense(100, activation="relu"), layers.Dense(100, activation="relu")]
    return Sequential([Input(shape), layers.Flatten(), *hidden, layers.Dense(classes)])


def compare_curves(model, x, y):
    """Return both curves of a model and their times."""
    began = time.perf_counter()
    distances = keras_drsl.minimal_distances(model, x, y, steps=STEPS, verbose=0)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    curve = keras_drsl.robustness_curve(model, x, y, eps=EPS, verbose=0)
    return {
        "seconds": ours,
        "seconds_of_curve": time.perf_counter() - began,
        "eps": EPS,
        "accuracy": distances.curve(EPS).accuracy,
        "accuracy_of_curve": curve.accuracy,
        "median": distances.median,
        "median_interval": distances.median_interval,
    }


def compare_medians(model, x, y):
    """Return the median distances of a model by norm, beside those of adv-lib, on the images where that finds any."""
    copy, medians = rivals.torch_copy(model), {}
    for norm in ("inf", 2, 1):
        found = keras_drsl.minimal_distances(model, x, y, norm=norm, steps=STEPS, verbose=0)
        theirs = rivals.adv_lib_fmn_distances(copy, x, y, norm, STEPS)
        some = np.isfinite(theirs)
        ours, other = (float(np.median(distances[some])) for distances in (found.distances, theirs))
        medians[str(norm)] = {"images": int(some.sum()), "ours": ours, "adv_lib": other}
    return medians


def main():
    train, (x, y) = datasets.load("digits")
    count, epochs = (20, 2) if ARGS.quick else (300, 30)
    x, y = x[:count], y[:count].astype("int64")
    rows, targets = [], []
    for architecture, make in {"convolutional": rivals.small_cnn, "dense": dense_network}.items():
        for kind in ("ce", "adversarial"):
            model = rivals.train(kind, *train, epochs=epochs, eps=TRAINED_EPS, make=make)
            row = {"model": f"{architecture}, {kind}", "images": count} | compare_curves(model, x, y)
            excess = 100 * float(np.max(np.subtract(row["accuracy"], row["accuracy_of_curve"])))
            share = row["seconds"] / row["seconds_of_curve"]
            targets += [
                {"name": f"{row['model']}: time, over that of the curve", "value": share, "target": MOST_TIME},
                {"name": f"{row['model']}: accuracy above the curve", "value": excess, "target": MOST_POINTS},
            ]
            if architecture == "convolutional" and importlib.util.find_spec("adv_lib"):
                row["medians"] = compare_medians(model, x, y)
                for norm, found in row["medians"].items():
                    name = f"{row['model']}: median distance in norm {norm}, over that of adv-lib"
                    ratio = found["ours"] / found["adv_lib"]
                    targets.append({"name": name, "value": ratio, "target": MOST_DISTANCE})
            rows.append(row)
            print({key: value for key, value in row.items() if key != "eps"}, flush=True)
    measure.write(ARGS, "distances", {"rows": rows, "targets": measure.verdict(targets)}, {"adv-lib", "torch"})


if __name__ == "__main__":
    main()
