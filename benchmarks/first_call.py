"""Measure what the first evaluation of a model costs, and how much of it is the compilation of its programs.

A convolutional network of digits with 2,900 weights and 100 test images: so little is computed that compilation is most
of it. Each round evaluates a new copy of the model, which no program was compiled for, by the suites "standard" and
"fast", without and with checks; the compilation of checks is not told apart.

    python -m benchmarks.first_call --out results --backend jax
"""

import time

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import keras
from keras import layers

import keras_drsl
from benchmarks import rivals
from keras_drsl import datasets
from studies.recipes import make_loss

EPS = 0.1
MOST_SECONDS = 4.0  # of compilation for the suite "standard" without checks


def evaluate(model, x, y, **options):
    """Return the seconds of an evaluation of a new copy, those of the compilation of attacks, and what is robust."""
    copy = rivals.fresh_copy(model)
    began = time.perf_counter()
    report = keras_drsl.evaluate_robustness(copy, x, y, eps=EPS, verbose=0, **options)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "compile_seconds": report.compile_seconds, "robust_accuracy": report.robust_accuracy}


def main():
    (x_train, y_train), (x, y) = datasets.load("digits")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), layers.Conv2D(8, 3, activation="relu"), layers.Flatten(), layers.Dense(10)]
    )
    model.compile("adam", make_loss("ce", 0))
    model.fit(x_train, y_train, epochs=1 if ARGS.quick else 5, batch_size=64, verbose=0)
    x, y = (x[:10], y[:10]) if ARGS.quick else (x[:100], y[:100])
    cases = [{"suite": suite, **rest} for suite in ("standard", "fast") for rest in ({"checks": []}, {})]
    cases = cases[:1] if ARGS.quick else cases
    rows = [{"options": options, "rounds": []} for options in cases]
    for _ in range(1 if ARGS.quick else 5):
        for row in rows:
            row["rounds"].append(evaluate(model, x, y, **row["options"]))
    for row in rows:
        for key in ("seconds", "compile_seconds"):
            row[key] = measure.quartiles([turn[key] for turn in row["rounds"]])
        print(row["options"], *(f"{key} {row[key][1]:.2f}" for key in ("seconds", "compile_seconds")), flush=True)
    targets = [
        {"name": "standard, seconds of compilation", "value": rows[0]["compile_seconds"][1], "target": MOST_SECONDS}
    ]
    measure.write(ARGS, "first_call", {"rows": rows, "targets": measure.verdict(targets)})


if __name__ == "__main__":
    main()
