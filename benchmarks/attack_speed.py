"""Measure the time of attacks: cleverhans as shipped, Foolbox, ART, torchattacks, this package.

PGD with 40 steps, and the whole ensemble of AutoAttack's kind, on a weak and on a robust model of digits, and with
`--data-dir` of MNIST. The contestants take turns; beside each time stands the robust accuracy it reached. Ours is the
whole `evaluate` of the suite "standard" without its checks, its programs compiled in a first round that is not counted
but printed. Contestants whose library is not installed are left out. About 30 minutes on two cores, most of it ART's;
`pip install ".[rivals]"` and `pip install --no-deps torchattacks` bring the libraries.

    python -m benchmarks.attack_speed --out results --data-dir DIR

On a GPU, through JAX, only ours and torchattacks (where torch sees the GPU) take part.
"""

import time

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__, data_dir=True)

import importlib.util

import numpy as np

from benchmarks import rivals
from keras_drsl import datasets
from keras_drsl.attacks import APGD, PGD, Square
from keras_drsl.models import Classifier
from keras_drsl.models.classifier import is_misclassified

EPS = {"digits": 0.15, "mnist": 0.2}
STEPS = 40


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


def ensemble(eps, queries):
    """Return the attacks of the suite "standard"."""
    return [
        APGD(eps),
        *(APGD(eps, loss=loss, targeted=True) for loss in ("dlr", "margin")),
        Square(eps, queries=queries),
    ]


def attack_all(attacks, classifier, x, y):
    """Run each attack on the images that withstood those before it."""
    x_adv, robust = x.copy(), np.arange(len(x))
    for attack in attacks:
        x_adv[robust] = attack(classifier, x[robust], y[robust], ids=robust, batch_size=256)
        robust = robust[~is_misclassified(classifier.logits(x_adv[robust]), y[robust])]
        if len(robust) == 0:
            break
    return x_adv


def contestants(model, x, y, eps, quick):
    """Return functions that attack images, by task and library."""
    classifier = Classifier(model)
    pgd = PGD(eps, steps=STEPS)
    tasks = {
        "pgd": {"ours": lambda: attack_all([pgd], classifier, x, y)},
        "ensemble": {"ours": lambda: attack_all(ensemble(eps, 50 if quick else 5000), classifier, x, y)},
    }
    if ARGS.backend == "tensorflow" and ARGS.device == "cpu":
        if installed("cleverhans"):
            tasks["pgd"]["cleverhans"] = lambda: rivals.cleverhans_pgd(model, x, y, eps, STEPS)
        if installed("foolbox"):
            tasks["pgd"]["foolbox"] = lambda: rivals.foolbox_pgd(model, x, y, eps, STEPS)
        if installed("art"):
            art = rivals.art_classifier(model)
            tasks["pgd"]["art"] = lambda: rivals.art_pgd(art, x, y, eps, STEPS)
            if not quick:
                tasks["ensemble"]["art"] = lambda: rivals.art_autoattack(art, x, y, eps)
    if installed("torch", "torchattacks") and not quick:
        device = "cuda" if ARGS.device == "gpu" else "cpu"
        copy = rivals.torch_copy(model)
        tasks["ensemble"]["torchattacks"] = lambda: rivals.torchattacks_autoattack(copy, x, y, eps, device)
    return tasks, classifier


def run(task, calls, classifier, x, y, rounds):
    """Measure the seconds and the robust accuracy of each contestant."""
    rows = {name: {"seconds": [], "robust_accuracy": None} for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            # ART's ensemble takes minutes and compiles nothing: one turn is enough.
            if task == "ensemble" and name == "art" and turn:
                continue
            start = time.perf_counter()
            x_adv = call()
            seconds = time.perf_counter() - start
            if turn == 0:
                rows[name]["first"] = seconds
                rows[name]["robust_accuracy"] = float((~is_misclassified(classifier.logits(x_adv), y)).mean())
            if turn or (task == "ensemble" and name == "art"):
                rows[name]["seconds"].append(seconds)
    for name, row in rows.items():
        middle = measure.quartiles(row["seconds"])[1]
        times = f"{middle:8.2f} s   first {row['first']:8.2f} s"
        print(f"  {task:<9} {name:<13} {times}   robust {row['robust_accuracy']:.1%}", flush=True)
    return rows


def compare(name, rows):
    """Return the targets: ratios of medians, and differences of accuracy in points."""
    targets = []

    def median(row):
        return measure.quartiles(row["seconds"])[1]

    pgd, whole = rows["pgd"], rows["ensemble"]
    others = [median(row) for other, row in pgd.items() if other != "ours"]
    if others:
        value = median(pgd["ours"]) / min(others)
        targets.append({"name": f"{name}: PGD-40, ours / the fastest other", "value": value, "target": 1.0})
    for other, target in (("art", 0.1), ("torchattacks", 0.7)):
        if other in whole:
            value = median(whole["ours"]) / median(whole[other])
            targets.append({"name": f"{name}: ensemble, ours / {other}", "value": value, "target": target})
            more = 100 * (whole["ours"]["robust_accuracy"] - whole[other]["robust_accuracy"])
            targets.append({"name": f"{name}: robust accuracy, ours - {other}, points", "value": more, "target": 0.0})
    return targets


def main():
    names = ["digits", *(["mnist"] if ARGS.data_dir and not ARGS.quick else [])]
    all_rows, targets = [], []
    for dataset in names:
        (x_train, y_train), (x, y) = datasets.load(dataset, ARGS.data_dir)
        epochs = {"digits": 30, "mnist": 2}[dataset]
        x_train, y_train = x_train[:12_000], y_train[:12_000]
        if ARGS.quick:
            epochs, x, y = 1, x[:8], y[:8]
        x, y = x[:100], y[:100].astype("int64")
        for kind in ("ce", "adversarial"):
            model = rivals.train(kind, x_train, y_train, epochs=epochs, eps=EPS[dataset])
            label = f"{dataset}, {kind}"
            print(label, flush=True)
            tasks, classifier = contestants(model, x, y, EPS[dataset], ARGS.quick)
            rows = {
                task: run(task, calls, classifier, x, y, 1 if ARGS.quick else {"pgd": 7, "ensemble": 3}[task])
                for task, calls in tasks.items()
            }
            clean = float((~is_misclassified(classifier.logits(x), y)).mean())
            all_rows.append({"model": label, "images": len(x), "eps": EPS[dataset], "clean_accuracy": clean, **rows})
            targets += compare(label, rows)
    targets = measure.verdict(targets)
    packages = {"cleverhans", "foolbox", "adversarial-robustness-toolbox", "torchattacks"}
    measure.write(ARGS, "attack_speed", {"rows": all_rows, "targets": targets}, packages)


if __name__ == "__main__":
    main()
