"""Measure what the suite "standard" costs on a network of 1,000 classes: time, gradients and queries.

The network is MobileNetV2 of `keras.applications` with random weights. It classifies 32 images of random colours, each
of 96 x 96 pixels. Their labels are its own predictions, and eps is chosen so that about three in ten images withstand
PGD. The code is that of a pretrained network, without a download. For 224 x 224 the time per gradient and per query is
measured, and the total is extrapolated. Fifteen minutes on two cores.

    python -m benchmarks.many_classes --out results
"""

import time

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
import numpy as np
from keras import ops

import keras_drsl
from keras_drsl.attacks import PGD, Noise
from keras_drsl.models.calls import count_calls
from keras_drsl.models.classifier import Classifier

CLASSES = 1000
MINUTES = 10  # the target
BISECTIONS = 10
ROBUST = 0.3  # the share of images that withstand PGD
BATCH = 32  # larger batches take longer per image


def make_network(size, alpha):
    """Return a network with preprocessing inside, images in [0, 255] and their labels."""
    keras.utils.set_random_seed(0)
    inner = keras.applications.MobileNetV2(
        (size, size, 3), alpha=alpha, weights=None, classes=CLASSES, classifier_activation=None
    )
    inputs = keras.Input((size, size, 3))
    model = keras.Model(inputs, inner(keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)))
    blobs = np.random.default_rng(0).uniform(0, 255, (4 if ARGS.quick else 32, 4, 4, 3))
    x = ops.convert_to_numpy(ops.image.resize(blobs.astype("float32"), (size, size)))
    # Batch normalizations get the statistics of noisy images. With those that they begin with, all outputs are equal.
    layers = [layer for layer in inner.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        layer.momentum = 0.0
    model(x + np.random.default_rng(1).normal(0, 64, x.shape).astype("float32"), training=True)
    return model, x, ops.convert_to_numpy(model(x)).argmax(1)


def choose_eps(model, x, y):
    """Return a radius at which some of the images withstand PGD."""
    low, high = 1e-4, 10.0
    classifier = Classifier(model)
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        attack = PGD(middle, clip_max=255, loss="margin", steps=20)
        left = (classifier.logits(attack(classifier, x, y)).argmax(1) == y).mean()
        low, high = (middle, high) if left > ROBUST else (low, middle)
    return high


def time_calls(model, x, y):
    """Return the seconds per gradient and per query, the programs compiled before."""
    classifier = Classifier(model)
    # So small that no image leaves before the last step.
    gradients, queries = PGD(1e-6, clip_max=255, steps=9), Noise(1e-6, clip_max=255, points=25)
    seconds, calls = {}, {}
    for attack in (gradients, queries):
        attack(classifier, x, y)
        start = time.perf_counter()
        with count_calls() as calls[attack]:
            attack(classifier, x, y)
        seconds[attack] = time.perf_counter() - start
    query = seconds[queries] / calls[queries].queries
    # Attacks with gradients make a few queries too.
    return (seconds[gradients] - query * calls[gradients].queries) / calls[gradients].gradients, query


def main():
    sizes, alpha = ((32, 64), 0.35) if ARGS.quick else ((96, 224), 1.0)
    model, x, y = make_network(sizes[0], alpha)
    eps = choose_eps(model, x, y)
    start = time.perf_counter()
    suite = "quick" if ARGS.quick else "standard"
    report = keras_drsl.evaluate_robustness(
        model, x, y, eps=eps, clip_max=255, suite=suite, batch_size=BATCH, verbose=1
    )
    seconds = time.perf_counter() - start
    print(report.to_text(verbose=True))
    rows = [
        {
            "size": sizes[0],
            "images": len(x),
            "eps": eps,
            "suite": suite,
            "robust_accuracy": report.robust_accuracy,
            "seconds": seconds,
            "gradients": report.num_gradients,
            "queries": report.num_queries,
        }
    ]
    for size in sizes:
        model, x, y = make_network(size, alpha)
        gradient, query = time_calls(model, x, y)
        total = gradient * report.num_gradients + query * report.num_queries
        print(
            f"{size} x {size}: {1000 * gradient:.1f} ms per gradient, {1000 * query:.1f} ms per query, "
            f"{total / 60:.1f} min for as many as above"
        )
        rows.append({"size": size, "seconds_per_gradient": gradient, "seconds_per_query": query, "extrapolated": total})
    targets = [{"name": f"{suite}, {sizes[0]} x {sizes[0]}, minutes", "value": seconds / 60, "target": MINUTES}]
    measure.write(ARGS, "many_classes", {"rows": rows, "targets": measure.verdict(targets)})


if __name__ == "__main__":
    main()
