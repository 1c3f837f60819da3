"""What DRSLoss and SoftmaxDiversity add to a whole training step, and what a step of adversarial training takes.

A small CNN on images of 28 x 28, the same trained on images attacked by PGD in ten steps, and a wide softmax head of
10,000 classes, each by `fit` as a user gets it by default, the losses taking turns. Then the step with PGD-10 beside
that of other libraries, where they are installed: `AdversarialTrainerMadryPGD` of ART, and the loop of cleverhans's
tutorial with its PGD: time, time of the first step with its compilation, and memory. It prints milliseconds per step
and the targets. About ten minutes on two cores.

    python -m benchmarks.step_overhead --out results
"""

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import importlib.util
import json
import time

import keras
import numpy as np

import keras_drsl
from benchmarks import rivals

EPS, ATTACK_STEPS = 0.1, 10
LOSSES = {"cross_entropy": "sparse_categorical_crossentropy", "drs": keras_drsl.DRSLoss(0.3)}


def cnn(activation="softmax"):
    """Return a model, its batch size, its input shape and its number of classes."""
    layers = [keras.Input((28, 28, 1))]
    for filters in (32, 64):
        layers += [keras.layers.Conv2D(filters, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D()]
    layers += [keras.layers.Flatten(), keras.layers.Dense(128, activation="relu")]
    return keras.Sequential([*layers, keras.layers.Dense(10, activation=activation)]), 128, (28, 28, 1), 10


def adversarial_cnn():
    """Return the model of `cnn`, trained on attacked images."""
    model, *batch = cnn()
    return keras_drsl.AdversarialTraining(model, EPS, steps=ATTACK_STEPS), *batch


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
            data = measure.fit_arguments(x, y, batch)
            calls[name + suffix] = lambda model=model, data=data: model.fit(**data, verbose=0)
    seconds = measure.interleave(calls, rounds)
    seconds = {name: [value / steps for value in values] for name, values in seconds.items()}
    medians = {name: measure.quartiles(values)[1] * 1e3 for name, values in seconds.items()}
    print(f"{make.__name__}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in medians.items()), flush=True)
    over = seconds["cross_entropy"]
    ratios = {name: measure.ratio(values, over) for name, values in seconds.items() if values is not over}
    return {"model": make.__name__, "steps": steps, "rounds": rounds, "seconds_a_step": seconds, "ratios": ratios}


def of_this_package(model):
    """Return what trains a model for an epoch."""
    robust = keras_drsl.AdversarialTraining(model, EPS, steps=ATTACK_STEPS)
    robust.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda x, y, batch: robust.fit(**measure.fit_arguments(x, y, batch), verbose=0)


def compiled_step():
    """Return a compiled training step of a model that returns logits, which these libraries leave to the caller."""
    import tensorflow as tf

    optimizer, loss_fn = keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(model, x, y):
        with tf.GradientTape() as tape:
            loss = loss_fn(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    return train_step


def of_art(model):
    """Return the same with ART's trainer."""
    from art.defences.trainer import AdversarialTrainerMadryPGD

    classifier = rivals.art_classifier(model, train_step=compiled_step())
    step = 2.5 * EPS / ATTACK_STEPS
    options = {"eps": EPS, "eps_step": step, "max_iter": ATTACK_STEPS, "num_random_init": 1, "nb_epochs": 1}

    def epoch(x, y, batch):
        AdversarialTrainerMadryPGD(classifier, batch_size=batch, **options).fit(x, np.eye(10, dtype="float32")[y])

    return epoch


def of_cleverhans(model):
    """Return the same with the loop of cleverhans's tutorial: its PGD, then a compiled step."""
    train_step = compiled_step()

    def epoch(x, y, batch):
        for start in range(0, len(x), batch):
            rows = slice(start, start + batch)
            train_step(model, rivals.cleverhans_pgd(model, x[rows], y[rows], EPS, ATTACK_STEPS), y[rows])

    return epoch


def trainers():
    """Return by library that is installed what makes the training of a model."""
    makers = {"keras_drsl": of_this_package}
    if keras.config.backend() == "tensorflow":
        makers |= {
            name: make
            for name, make in (("art", of_art), ("cleverhans", of_cleverhans))
            if importlib.util.find_spec(name)
        }
    return makers


def prepare(make, steps):
    """Return what trains a new model on a data set of some batches, and the data set with the size of a batch."""
    keras.utils.set_random_seed(0)
    model, batch, shape, classes = cnn(activation=None)
    rng = np.random.default_rng(0)
    x, y = rng.random((steps * batch, *shape), "float32"), rng.integers(0, classes, steps * batch)
    return make(model), x, y, batch


def memory():
    """Measure the memory in MiB that a step needs, by library."""
    needed = {}
    for name, make in trainers().items():
        train, x, y, batch = prepare(make, 1)
        needed[name] = measure.peak_bytes(lambda train=train, x=x, y=y, batch=batch: train(x, y, batch)) / 2**20
    return needed


def compare_libraries(steps, rounds):
    """Measure the seconds per step of adversarial training, and of the first one, of each library that is installed."""
    calls, first = {}, {}
    for name, make in trainers().items():
        train, x, y, batch = prepare(make, steps)
        began = time.perf_counter()
        train(x[:batch], y[:batch], batch)
        first[name] = time.perf_counter() - began
        calls[name] = lambda train=train, x=x, y=y, batch=batch: train(x, y, batch)
    seconds = measure.interleave(calls, rounds)
    seconds = {name: [value / steps for value in values] for name, values in seconds.items()}
    for name, values in seconds.items():
        rate = batch / measure.quartiles(values)[1]
        print(
            f"PGD-{ATTACK_STEPS} with {name}: {rate:.0f} images per second, first step {first[name]:.1f} s", flush=True
        )
    return {"batch": batch, "steps": steps, "rounds": rounds, "seconds_a_step": seconds, "first_step": first}


def targets_of_libraries(row):
    """Return the target of a step beside the fastest other library."""
    seconds = row["seconds_a_step"]
    others = [name for name in seconds if name != "keras_drsl"]
    if not others:
        return []
    fastest = min(others, key=lambda name: measure.quartiles(seconds[name])[1])
    found = measure.ratio(seconds["keras_drsl"], seconds[fastest])
    name = f"a step of PGD-{ATTACK_STEPS} adversarial training / that of {fastest}"
    return [{"name": name, "value": found["ratio"], "spread": found["spread"], "target": 0.8}]


def main():
    if ARGS.memory:
        print(json.dumps(memory()))
        return
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
    libraries = compare_libraries(max(steps // 5, 2), 2 if ARGS.quick else 9)
    libraries["memory_mib"] = measure.memory_in_fresh_process(ARGS)
    print("memory of a step of PGD-10 in MiB:", libraries["memory_mib"])
    targets = measure.verdict(targets + targets_of_libraries(libraries))
    packages = {"adversarial-robustness-toolbox", "cleverhans"} if len(libraries["first_step"]) > 1 else ()
    measure.write(ARGS, "step_overhead", {"rows": rows, "libraries": libraries, "targets": targets}, packages)


if __name__ == "__main__":
    main()
