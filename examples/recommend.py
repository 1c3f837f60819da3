"""Recommend images to users from ratings of which some are wrong: bilateral softmax loss beside the softmax loss.

Each user likes the images of one digit and has rated ten of them. A share of these positive ratings is replaced by
images of other digits: false positives. Two towers, one for users and one for images, are trained on them; the scores
are cosine similarities. Precision@20 says which share of the 20 best images that a user has not rated show the digit.

For each loss, the temperatures are chosen on one user in four, by the share of held-out ratings among the best 20,
false ones included, from eight settings each. The other users are the test.

It takes scikit-learn's digits, without a download, and about ten minutes on two cores.

    python examples/recommend.py --out runs
"""

import argparse
import itertools
import json
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import keras_drsl

RATINGS, HELD_OUT, TOP = 10, 3, 20
TEMPERATURES = (0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56)
SETTINGS = {
    "softmax": [{"temperature": temperature} for temperature in TEMPERATURES],
    "bilateral": [
        {"negative_temperature": negative, "positive_temperature": factor * negative}
        for negative, factor in itertools.product((0.07, 0.1, 0.2, 0.4), (1.5, 3.0))
    ],
}


class Scores(layers.Layer):
    """Return the cosine similarities of users and all images, from the embeddings of users."""

    def __init__(self, images):
        super().__init__()
        self.images = images
        self.tower = keras.Sequential(
            [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dense(32), layers.UnitNormalization()]
        )

    def call(self, users):
        return ops.matmul(users, ops.transpose(self.tower(self.images)))


def draw_ratings(digits, users, false_share, seed):
    """Return the digit that each user likes, and the images that it has rated, shape `(users, RATINGS)`."""
    random = np.random.default_rng(seed)
    liked = np.arange(users) % 10
    ratings = np.stack([random.choice(np.flatnonzero(digits == digit), RATINGS, replace=False) for digit in liked])
    for row, digit in zip(ratings, liked, strict=True):
        are_false = random.random(RATINGS) < false_share
        row[are_false] = random.choice(np.flatnonzero(digits != digit), are_false.sum(), replace=False)
    return liked, ratings


def make_loss(name, setting):
    if name == "bilateral":
        return keras_drsl.BilateralSoftmaxLoss(**setting, from_logits=True)
    entropy = keras.losses.CategoricalCrossentropy(from_logits=True)
    return lambda y, scores: entropy(y, scores / setting["temperature"])


def train(images, ratings, name, setting, epochs, seed):
    """Train both towers, and return the scores of all users and images."""
    keras.utils.set_random_seed(seed)
    users = np.arange(len(ratings))
    y = np.zeros((len(users), len(images)), "float32")
    np.put_along_axis(y, ratings, 1 / ratings.shape[1], axis=1)
    embedding = [keras.Input((), dtype="int32"), layers.Embedding(len(users), 32), layers.UnitNormalization()]
    model = keras.Sequential([*embedding, Scores(images)])
    model.compile(keras.optimizers.Adam(0.01), make_loss(name, setting))
    model.fit(users, y, batch_size=64, epochs=epochs, verbose=0)
    return model.predict(users, batch_size=256, verbose=0)


def recall(scores, rated, wanted):
    """Return the mean share of the wanted images, at most TOP of them, among the best TOP that were not rated."""
    scores = scores.copy()
    np.put_along_axis(scores, rated, -np.inf, axis=1)
    best = np.argsort(-scores, axis=1)[:, :TOP]
    found = np.take_along_axis(wanted, best, axis=1).sum(axis=1)
    return float((found / np.minimum(wanted.sum(axis=1), TOP)).mean())


def run(images, digits, false_share, args):
    """Choose the temperatures of each loss, and return its precision on test users for each seed."""
    results = {}
    for name, settings in SETTINGS.items():
        chosen, found = None, []
        for seed in range(args.seeds):
            liked, ratings = draw_ratings(digits, args.users, false_share, seed)
            choosing = np.arange(args.users) % 4 == 0
            if chosen is None:
                known, held_out = ratings[:, HELD_OUT:], ratings[:, :HELD_OUT]
                wanted = np.zeros((args.users, len(images)), bool)
                np.put_along_axis(wanted, held_out, True, axis=1)
                recalls = [
                    recall(
                        train(images, known, name, setting, args.epochs, 100)[choosing],
                        known[choosing],
                        wanted[choosing],
                    )
                    for setting in settings
                ]
                chosen = settings[int(np.argmax(recalls))]
            scores = train(images, ratings, name, chosen, args.epochs, seed)
            wanted = digits[None] == liked[:, None]
            np.put_along_axis(wanted, ratings, False, axis=1)
            found.append(recall(scores[~choosing], ratings[~choosing], wanted[~choosing]))
        results[name] = {"setting": chosen, "precision": found}
        text = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        print(f"{false_share:.0%} false: {name:10} precision@{TOP} {np.mean(found):.1%} ({text})", flush=True)
    return results


def main(arguments=None):
    args = parse_arguments(arguments)
    path = Path(args.out) / "recommend.json" if args.out else None
    if path is not None and path.exists():
        raise SystemExit(f"`--out` must be a folder without results. Received: --out {args.out}, which has {path}")
    (images, digits), _ = keras_drsl.datasets.load("digits")
    results = {str(share): run(images, digits, share, args) for share in args.false_shares}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"arguments": vars(args), "results": results}, indent=1) + "\n")
    return results


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--false-shares", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="folder for the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
