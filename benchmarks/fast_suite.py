"""Compare suite "fast" with "standard": robust accuracy, gradients and time, on the same models and images.

With `--design`, on four models and validation images; those of digits and MNIST chose the settings of `FastAPGD` and
`FastSquare`. Without it, on four other models and test images: another architecture, another seed and loss, another
seed, and a model without gradients, each with three seeds of the attacks. Where torch and torchattacks are installed,
its AutoAttack attacks a copy of the first three with the same weights. Each row is written when it is done, and rows
that are in the file are not run again. Times are those of attacks with their compilation, without checks.

    python -m benchmarks.fast_suite --data-dir DIR --out results
    python -m benchmarks.fast_suite --data-dir DIR --out results --design
"""

import time

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(
        __doc__,
        data_dir=True,
        more=lambda parser: parser.add_argument("--design", action="store_true", help="on the models of the design"),
    )

import importlib.util
import json
import math
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_drsl
from benchmarks import rivals
from keras_drsl import datasets
from keras_drsl.attacks import FastAPGD, FastSquare
from keras_drsl.attacks.fast import STAGES
from studies.networks import small_cnn
from studies.recipes import make_loss, split

# Data set, eps, noise, loss, method of adversarial training, architecture and seed of each model.
DESIGN = {
    "digits, DRSLoss and noise": ("digits", 0.15, 0.15, "drs", None, "cnn", 0),
    "MNIST, cross-entropy": ("mnist", 0.1, 0, "ce", None, "cnn", 0),
    "MNIST, adversarial training": ("mnist", 0.2, 0, "ce", "pgd", "cnn", 0),
    "CIFAR-10, adversarial training": ("cifar10", 8 / 255, 0, "ce", "fgsm", "cnn", 0),
}
TEST = {
    "digits, dense network, adversarial training": ("digits", 0.15, 0, "ce", "pgd", "dense", 1),
    "CIFAR-10, adversarial training": ("cifar10", 8 / 255, 0, "ce", "fgsm", "cnn", 1),
    "MNIST, DRSLoss and noise": ("mnist", 0.2, 0.3, "drs", None, "cnn", 1),
    "MNIST, rounded inputs": ("mnist", 0.1, 0, "ce", None, "rounded", 1),
}
EPOCHS = {"digits": 30, "mnist": 6, "cifar10": 8}
VALIDATION = {"digits": 240, "mnist": 1000, "cifar10": 500}
IMAGES = {"digits": 360, "mnist": 1000, "cifar10": 300}
MOST_POINTS, MOST_COST = 0.5, 0.2


class Rounded(keras.layers.Layer):
    """Inputs rounded to steps of 0.1, with no gradient."""

    def call(self, x):
        return ops.round(x * 10) / 10


def build(architecture, shape, noise):
    if architecture != "dense":
        return small_cnn(shape, noise)
    hidden = [keras.layers.Dense(200, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])


def train(model, x, y):
    """Return a trained network, and what is attacked of it."""
    name, eps, noise, loss, method, architecture, seed = model
    epochs = 1 if ARGS.quick else EPOCHS[name]
    keras.utils.set_random_seed(seed)
    network = trained = build(architecture, x.shape[1:], noise)
    if method:
        trained = keras_drsl.AdversarialTraining(network, eps, method=method, warmup_epochs=epochs // 2)
    trained.compile("adam", make_loss(loss, 0.3))
    trained.fit(x, y, epochs=epochs, batch_size=64 if name == "digits" else 128, verbose=0)
    rounded = keras.Sequential([keras.Input(x.shape[1:]), Rounded(), network])
    return network, rounded if architecture == "rounded" else network


def attack(model, x, y, eps, suite, seed):
    """Return what a suite found, and what it cost, with its compilation."""
    fresh = rivals.fresh_copy(model)
    began = time.perf_counter()
    report = keras_drsl.evaluate_robustness(fresh, x, y, eps=eps, suite=suite, checks=[], seed=seed, verbose=0)
    return {
        "seconds": time.perf_counter() - began,
        "robust": sum(name is None for name in report.per_example["broken_by"]),
        "compile_seconds": report.compile_seconds,
        "gradients": report.num_gradients,
        "queries": report.num_queries,
    }


def autoattack(network, x, y, eps, seed):
    """Return what AutoAttack of torchattacks found, and its time."""
    copy, began = rivals.torch_copy(network), time.perf_counter()
    x_adv = rivals.torchattacks_autoattack(copy, x, y, eps, seed=seed)
    seconds = time.perf_counter() - began
    robust = int((np.asarray(network.predict(x_adv, verbose=0)).argmax(1) == y).sum())
    return {"seconds": seconds, "robust": robust}


def targets_of(rows):
    """Return the targets, by model over all seeds of the attacks."""
    targets = []
    for name in dict.fromkeys(row["model"] for row in rows):
        some = [row for row in rows if row["model"] == name]
        suites = [suite for suite in ("fast", "standard", "autoattack") if suite in some[0]]
        sums = {suite: {key: sum(row[suite][key] for row in some) for key in some[0][suite]} for suite in suites}
        fast, standard = sums["fast"], sums["standard"]
        most = math.ceil(MOST_POINTS / 100 * some[0]["images"])
        worst = max(row["fast"]["robust"] - row["standard"]["robust"] for row in some)
        targets.append({"name": f"{name}: images left robust, beyond standard's", "value": worst, "target": most})
        targets += [
            {"name": f"{name}: {key}, over those of standard", "value": fast[key] / standard[key], "target": MOST_COST}
            for key in ("gradients", "seconds")
        ]
        if "autoattack" in sums:
            other = sums["autoattack"]
            for suite, limit in (("fast", 0.25), ("standard", 0.7)):
                ours = sums[suite]
                of = f"{name}: {suite} over AutoAttack"
                targets.append({"name": f"{of}, time", "value": ours["seconds"] / other["seconds"], "target": limit})
                more = (ours["robust"] - other["robust"]) / len(some)
                targets.append({"name": f"{of}, images left robust, difference", "value": more, "target": 0})
    return targets


def main():
    name = "fast_suite_design" if ARGS.design else "fast_suite"
    path = Path(ARGS.out) / f"{name}_{ARGS.backend}_{ARGS.device}.json"
    has_rival = importlib.util.find_spec("torchattacks") is not None and not ARGS.design
    # Rows of other attacks, sizes or rivals are run again.
    made = {"attacks": repr((STAGES, FastAPGD(1.0), FastSquare(1.0)))}
    made |= {"quick": ARGS.quick, "rival": has_rival}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [row for row in rows if row["made"] == made]
    for title, model in (DESIGN if ARGS.design else TEST).items():
        data, eps, architecture = model[0], model[1], model[-2]
        if data != "digits" and not ARGS.data_dir:
            continue
        seeds = range(1 if ARGS.design or ARGS.quick else 3)
        left = [seed for seed in seeds if not any((row["model"], row["seed"]) == (title, seed) for row in rows)]
        if not left:
            continue
        learned, (x, y) = datasets.load(data, ARGS.data_dir if data != "digits" else None)
        learned, validation = split(learned, VALIDATION[data], 0)
        x, y = validation if ARGS.design else (x, y)
        count = 20 if ARGS.quick else min(IMAGES[data], len(x), 200 if ARGS.design else len(x))
        x, y = x[:count], y[:count].astype("int64")
        network, attacked = train(model, *(part[: 500 if ARGS.quick else 20_000] for part in learned))
        for seed in left:
            row = {"model": title, "seed": seed, "images": count, "eps": eps, "made": made}
            # In turns, so that a slow machine is slow for all.
            row |= {suite: attack(attacked, x, y, eps, suite, seed) for suite in ("fast", "standard")}
            if has_rival and architecture != "rounded":
                row["autoattack"] = autoattack(network, x, y, eps, seed)
            rows.append(row)
            print(row, flush=True)
            record = {"rows": rows, "targets": measure.verdict(targets_of(rows))}
            measure.write(ARGS, name, record, {"torchattacks"} if has_rival else (), module="fast_suite")


if __name__ == "__main__":
    main()
