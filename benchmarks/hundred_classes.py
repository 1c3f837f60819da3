"""Compare two orders of the targets of an attack on a task of 100 classes: by logits, and by linearized distance.

Images are pairs of real digits side by side, and the class is the number that they read as. No digit of a test pair is
in a pair of training. Every other class is a target of APGD on the margin, 25 steps, for each test image. From which
targets succeeded follows how many images the first k targets of an order would have left, without another attack.
The order by logits takes the largest ones first. The other takes first the classes that are nearest on the model's
linearization, among the 2 k of the largest logits, as `suite="fast"` does; that costs 2 k gradients more per image.
About half an hour on one core.

    python -m benchmarks.hundred_classes --out results
"""

from benchmarks import measure

if __name__ == "__main__":
    ARGS = measure.parse_arguments(__doc__)

import math

import keras
import numpy as np

import keras_drsl
from keras_drsl import datasets
from keras_drsl.attacks import APGD, Attack
from keras_drsl.attacks.gradients import rank_targets
from studies.networks import small_cnn
from studies.recipes import make_loss

CLASSES = 100
STEPS = 25
COUNTS = (1, 2, 3, 5, 9, 15, 25, 50, 99)
AT_ONCE = 9  # targets that share a batch
ENOUGH = 0.5  # points above the robust accuracy after all targets
# Loss, noise, whether adversarially trained, and eps of each model.
MODELS = {
    "cross-entropy": ("ce", 0, False, 0.05),
    "DRSLoss and noise": ("drs", 0.15, False, 0.1),
    "adversarial training": ("ce", 0, True, 0.15),
}


def pairs(data, count, seed):
    """Return images of two digits side by side, and the numbers that they read as."""
    x, y = data
    left, right = np.random.default_rng(seed).integers(0, len(x), (2, count))
    return np.concatenate([x[left], x[right]], axis=2), (10 * y[left] + y[right]).astype("int64")


def train(model, x, y, seed):
    """Return a trained network."""
    loss, noise, adversarial, eps = model
    epochs = 4 if ARGS.quick else 15
    keras.utils.set_random_seed(seed)
    network = trained = small_cnn(x.shape[1:], noise, CLASSES)
    if adversarial:
        trained = keras_drsl.AdversarialTraining(network, eps, method="fgsm", warmup_epochs=epochs // 3)
    trained.compile("adam", make_loss(loss, 0.3))
    trained.fit(x, y, epochs=epochs, batch_size=128, verbose=0)
    return network


class EveryTarget(Attack):
    """APGD towards every other class, of which it keeps what succeeded and the orders of the targets."""

    def run(self, classifier, batch):
        attack = APGD(threat=self.threat, loss="margin", targeted=True, targets=1, steps=STEPS, seed=self.seed)
        others = np.argsort(-batch.logits, axis=1, kind="stable")
        others = others[others != batch.y[:, None]].reshape(len(batch.x), -1)
        self.orders = {"logits": {count: others[:, :count] for count in COUNTS}, "distance": {}}
        for count in COUNTS:
            self.orders["distance"][count] = rank_targets(classifier, batch, self.threat, count)
        self.broken = np.zeros(batch.logits.shape, bool)
        for some in np.array_split(np.arange(CLASSES - 1), math.ceil((CLASSES - 1) / AT_ONCE)):
            rows = np.repeat(np.arange(len(batch.x)), len(some))
            targets = others[:, some].reshape(-1, 1).astype("int32")
            restart = np.tile(some, len(batch.x))
            tiled = batch.take(rows)._replace(targets=targets, restart=restart, example_index=np.arange(len(rows)))
            found = classifier.logits(attack.run(classifier, tiled)).argmax(1)
            self.broken[rows, targets[:, 0]] = found != batch.y[rows]
        return batch.x


def measure_model(name, model, learned, test, seed):
    """Return how many images each order leaves robust after its first targets."""
    network = train(model, *learned, seed)
    attack = EveryTarget(model[-1], seed=seed)
    attack(network, *test)
    correct = len(attack.broken)
    rows = np.arange(correct)[:, None]
    left = {
        order: {count: int((~attack.broken[rows, targets].any(axis=1)).sum()) for count, targets in by_count.items()}
        for order, by_count in attack.orders.items()
    }
    row = {"model": name, "seed": seed, "eps": model[-1], "images": len(test[0]), "correct": correct, "robust": left}
    after_all = int((~attack.broken.any(axis=1)).sum())
    most = after_all + math.floor(ENOUGH / 100 * len(test[0]))
    row["robust_after_all"] = after_all
    row["targets_needed"] = {
        order: min(count for count in COUNTS if by_count[count] <= most) for order, by_count in left.items()
    }
    print(row, flush=True)
    return row


def main():
    learned, test = datasets.load("digits")
    learned = pairs(learned, 4000 if ARGS.quick else 20_000, 0)
    test = pairs(test, 10 if ARGS.quick else 200, 1)
    rows = [
        measure_model(name, model, learned, test, seed)
        for name, model in list(MODELS.items())[: 1 if ARGS.quick else None]
        for seed in range(1 if ARGS.quick else 2)
    ]
    targets = [
        {
            "name": f"{row['model']}, seed {row['seed']}: targets needed, linearized distance over logits",
            "value": row["targets_needed"]["distance"] / row["targets_needed"]["logits"],
            "target": 1.0,
        }
        for row in rows
    ]
    measure.write(ARGS, "hundred_classes", {"rows": rows, "targets": measure.verdict(targets)})


if __name__ == "__main__":
    main()
