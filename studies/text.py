"""Attack a model of text in the space of its embeddings: what DRSLoss, PRSLoss and cross-entropy restrain.

The losses work on predictions of shape (batch, time, vocabulary). A small recurrent model learns to predict the next
word of the topics of Python's own help, which every Python installation has. Then PGD moves the embeddings of the 16
words before a prediction, each number by at most `--eps` standard deviations of the model's embeddings.

Expected: DRSLoss makes the wrong words of one position equal (the variance of their log-softmax values falls); PRSLoss
makes the level of the largest wrong words equal between positions (the last but one column). Neither makes this model
harder to attack: DRSLoss predicts more words than cross-entropy, and loses all of them.

About two minutes on two cores.

    python -m studies.text
    python -m studies.text --seeds 3 --out results --overwrite
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

import keras
import numpy as np

import keras_drsl
from keras_drsl.attacks import PGD
from keras_drsl.models import Classifier
from studies import records

MODULE = "studies.text"
TIME, WIDTH, UNITS, BATCH, RATE = 16, 64, 128, 64, 0.003
VOCABULARY = 2000  # the most frequent words; all others share one id
# The strengths are first guesses and were not tuned.
LOSSES = {
    "cross-entropy": lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "DRSLoss, lam 0.001": lambda: keras_drsl.DRSLoss(0.001, from_logits=True),
    "PRSLoss, lam 0.0001": lambda: keras_drsl.PRSLoss(1e-4, from_logits=True),
}
COLUMNS = ("next word right", "after PGD on CE", "and on the margin", "perplexity", "variance of wrong words",
           "variance of their top 4 between places", "spread of the embeddings")  # fmt: skip


def main(arguments=None):
    args = parse_arguments(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / "text"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    train, test, size = read_text()
    rows = []
    for name, make in LOSSES.items():
        row = {"loss": name, "runs": []}
        for seed in range(args.seeds):
            print(f"\n{name}, seed {seed}", flush=True)
            keras.utils.set_random_seed(seed)
            embed, predict = keras.Sequential([keras.layers.Embedding(size, WIDTH)]), build_model(size)
            model = keras.Sequential([keras.Input((TIME,)), embed, predict])
            model.compile(keras.optimizers.Adam(RATE), make(), metrics=["accuracy"])
            model.fit(*train, epochs=args.epochs, batch_size=BATCH, verbose=2)
            row["runs"].append(dict(zip(COLUMNS, measure_model(embed, predict, *test, args), strict=True)))
            print(row["runs"][-1])
        rows.append(row)
    table = make_table(rows, len(test[0][: args.max_windows]), args)
    print("\n" + table)
    stem.with_suffix(".md").write_text(table)
    record = {"command": records.command(MODULE, args), "versions": records.versions(), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    print(f"Written: {stem}.md, .json")


def read_text():
    """Return windows of word ids and the words after each, for training and test, and the size of the vocabulary.

    Every sixth topic is for the test, without the windows that occur in a training topic: topics quote each other.
    """
    from pydoc_data.topics import topics

    texts = [re.findall(r"[a-z_]+|[.,;:()]", topics[name].lower()) for name in sorted(topics)]
    train = [text for number, text in enumerate(texts) if number % 6]
    counts = Counter(word for text in train for word in text)
    ids = {word: number + 1 for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}

    def windows(texts, step):
        words = np.array([ids.get(word, 0) for text in texts for word in text])
        return np.lib.stride_tricks.sliding_window_view(words, TIME + 1)[::step]

    known = set(map(bytes, windows(train, 1)))
    test = [window for window in windows(texts[::6], TIME) if bytes(window) not in known]
    return *((part[:, :-1], part[:, 1:]) for part in (windows(train, TIME), np.stack(test))), len(ids) + 1


def build_model(size):
    """Return a model from embeddings, shape (batch, time, width), to logits, (batch, time, vocabulary)."""
    layers = [keras.layers.Dropout(0.2), keras.layers.GRU(UNITS, return_sequences=True), keras.layers.Dropout(0.3)]
    return keras.Sequential([keras.Input((TIME, WIDTH)), *layers, keras.layers.Dense(size)])


def measure_model(embed, predict, x, y, args):
    """Return the columns of the table: accuracies at the last position of each window, the others over all of them."""
    x, y = x[: args.max_windows], y[: args.max_windows]
    embedded = keras.ops.convert_to_numpy(embed(x))
    logits = predict.predict(embedded, verbose=0)
    # The attack sees the last position only, and embeddings have no valid range: the clip range never binds.
    last = Classifier(keras.Sequential([predict, keras.layers.Lambda(lambda z: z[:, -1])]))
    spread = float(np.std(keras.ops.convert_to_numpy(embed.layers[0].embeddings)))
    eps = args.eps * spread
    bound = float(np.abs(embedded).max()) + eps
    right = np.ones(len(x), bool)
    accuracy = [np.mean(logits[:, -1].argmax(1) == y[:, -1])]
    for loss in ("ce", "margin"):
        attack = PGD(eps, loss=loss, steps=args.steps, clip_min=-bound, clip_max=bound)
        right &= last.logits(attack(last, embedded, y[:, -1])).argmax(1) == y[:, -1]
        accuracy.append(np.mean(right))
    cross_entropy = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    diversity = keras_drsl.softmax_diversity(y, logits, from_logits=True)
    wrong = np.where(np.eye(logits.shape[-1], dtype=bool)[y], -np.inf, logits)
    top = np.sort(wrong, axis=-1)[..., -4:].mean(-1)
    cross_entropy, diversity = (keras.ops.convert_to_numpy(keras.ops.mean(x)) for x in (cross_entropy, diversity))
    return [*map(float, accuracy), float(np.exp(cross_entropy)), float(diversity), float(np.var(top)), spread]


def make_table(rows, count, args):
    """Return a Markdown table: the mean and, of several seeds, the standard deviation."""
    lines = [
        f"Next word of Python's help topics, {args.epochs} epochs, mean of {args.seeds} seed(s), {count} test windows; "
        f"PGD of {args.steps} steps on the embeddings, L-inf, eps {args.eps:g} of their own spread, the standard "
        "deviation; accuracy in %, what is left after one attack and then the other",
        "",
        f"| loss | {' | '.join(COLUMNS)} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        cells = []
        for name in COLUMNS:
            values = np.array([run[name] for run in row["runs"]]) * (100 if name in COLUMNS[:3] else 1)
            spread = f" +- {values.std(ddof=1):.2g}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3g}{spread}")
        lines.append(f"| {row['loss']} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nWritten by `{records.command(MODULE, args)}`.\n"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many models of each loss")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--eps", type=float, default=0.5, help="of the attack, in standard deviations of the embeddings"
    )
    parser.add_argument("--steps", type=int, default=20, help="of the attack")
    parser.add_argument("--max-windows", type=int, default=500, help="how many test windows")
    parser.add_argument("--out", default="runs", help="folder for the table and the JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args(arguments)
    if not 0 < args.eps < 100:
        parser.error(f"--eps must lie in (0, 100). Received: {args.eps}")
    for name in ("seeds", "epochs", "steps", "max_windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
