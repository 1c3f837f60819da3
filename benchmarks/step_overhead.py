"""What DRSLoss and SoftmaxDiversity add to a whole training step.

A small CNN on images of 28 x 28, the same trained on images attacked by PGD in ten steps, and a wide softmax head of
10,000 classes, each by `fit` as a user gets it by default, the losses taking turns. It prints milliseconds per step and
the targets. About eight minutes on two cores.

    python -m benchmarks.step_overhead --out results
"""

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
import numpy as np

import keras_drsl

LOSSES = {"cross_entropy": "sparse_categorical_crossentropy", "drs": keras_drsl.DRSLoss(0.3)}


def cnn():
    """Return a model, its batch size, its input shape and its number of classes."""
    layers = [keras.Input((28, 28, 1))]
    for filters in (32, 64):
        layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D()]
    layers += [keras.layers.Flatten(), keras.layers.Dense(128, activation="relu")]
    return keras.Sequential([*layers, keras.layers.Dense(10, activation="softmax")]), 128, (28, 28, 1), 10


def adversarial_cnn():
    """Return the model of `cnn`, trained on attacked images."""
    model, *batch = cnn()
    return keras_drsl.AdversarialTraining(model, 0.1), *batch


def wide_head():
    """Return a model whose loss is a large part of its step."""
    layers = [keras.Input((256,)), keras.layers.Dense(256, activation="relu")]
    return keras.Sequential([*layers, keras.layers.Dense(10_000, activation="softmax")]), 256, (256,), 10_000


def run_model(make, steps, rounds):
    """Measure the seconds per step of each combination of loss and metric."""
    calls = {}
    for name, loss in LOSSES.items():
        for suffix, metrics in (("", []), ("_with_diversity", [keras_drsl.SoftmaxDiversity()])):
            keras.utils.set_random_seed(0)
            model, batch, shape, classes = make()
            model.compile(optimizer="sgd", loss=loss, metrics=metrics)
            rng = np.random.default_rng(0)
            x = rng.random((steps * batch, *shape), "float32")
            y = rng.integers(0, classes, steps * batch)
            calls[name + suffix] = lambda model=model, x=x, y=y, batch=batch: model.fit(
                x, y, batch_size=batch, shuffle=False, verbose=0
            )
    seconds = measure.interleave(calls, rounds)
    seconds = {name: [value / steps for value in values] for name, values in seconds.items()}
    medians = {name: measure.quartiles(values)[1] * 1e3 for name, values in seconds.items()}
    print(f"{make.__name__}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items()), flush=True)
    over = seconds["cross_entropy"]
    ratios = {name: measure.ratio(values, over) for name, values in seconds.items() if values is not over}
    return {"model": make.__name__, "steps": steps, "rounds": rounds, "seconds_a_step": seconds, "ratios": ratios}


def main():
    steps, rounds = (2, 2) if ARGS.quick else (20, 21)
    # A step under attack takes ten times as long.
    rows = [run_model(make, steps, rounds) for make in (cnn, wide_head)]
    rows.append(run_model(adversarial_cnn, max(steps // 5, 2), rounds))
    for row in rows:
        for name, found in row["ratios"].items():
            low, high = found["spread"]
            print(f"{row['model']}: {name} / cross_entropy {found['ratio']:.3f}, turns {low:.3f} to {high:.3f}")
    targets = []
    for name, row in (("a whole step of the CNN", rows[0]), ("an adversarial step of the CNN", rows[-1])):
        step = row["ratios"]["drs"]
        targets.append(
            {
                "name": f"{name}, DRSLoss / cross-entropy",
                "value": step["ratio"],
                "target": 1.01,
                "spread": step["spread"],
            }
        )
    targets = measure.verdict(targets)
    measure.write(ARGS, "step_overhead", {"rows": rows, "targets": targets})


if __name__ == "__main__":
    main()
