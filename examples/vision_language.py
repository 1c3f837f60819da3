"""Train a small vision-language model with cross-entropy, DRSLoss and PRSLoss, and attack the images that it describes.

The model is a PaliGemma of keras-hub with few and small layers, and random weights at the start. It describes
scikit-learn's digits (8 x 8 pixels) in four words, such as "odd low three .". The attack changes the pixels only. The
words that the model is given so far, and all masks, stay as they are: token accuracy with teacher forcing.

Each loss tries three settings on validation images: cross-entropy three learning rates, the others three strengths at
the best of these rates. The best setting of each is trained with other seeds and evaluated on test images by the suite
"standard".

Expected: all models describe clean images well, and the attack takes a third to a half of the tokens. No loss helps.

On two cores: one to two hours.

    pip install ".[tensorflow,examples,hub]"
    python examples/vision_language.py
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_drsl
from keras_drsl import datasets
from keras_drsl.attacks import APGD

WORDS = ["", "<start>", ".", "even", "odd", "low", "high"]
WORDS += ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LENGTH = 4  # of a caption, in words
BATCH = 64
VALIDATION = 240
RATES = (3e-3, 1e-2, 3e-2)
STRENGTHS = {"cross-entropy": None, "DRSLoss": (0.01, 0.1, 1.0), "PRSLoss": (1e-5, 1e-4, 1e-3)}
COLUMNS = ("tokens right", "captions right", "tokens right under attack")


def main(arguments=None):
    args = parse_arguments(arguments)
    stem = Path(args.out) / "vision_language"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    stem.parent.mkdir(parents=True, exist_ok=True)
    (images, digits), test = datasets.load("digits")
    train, validation = (images[:-VALIDATION], digits[:-VALIDATION]), (images[-VALIDATION:], digits[-VALIDATION:])
    rows = []
    for loss, strengths in STRENGTHS.items():
        # A setting is a learning rate and the arguments of the loss. Cross-entropy comes first and has none.
        settings = [(rate, {}) for rate in RATES]
        if strengths is not None:
            settings = [(rows[0]["setting"][0], {"lam": lam}) for lam in strengths]
        tried = []
        for setting in settings:
            model = train_model(loss, setting, train, args.seeds, args)
            tried.append({"setting": setting, **evaluate(model, validation, args, suite="quick")})
            print(loss, tried[-1], flush=True)
        best = max(tried, key=lambda run: run["tokens right under attack"])
        runs = []
        for seed in range(args.seeds):
            model = train_model(loss, best["setting"], train, seed, args)
            runs.append({"seed": seed, **evaluate(model, test, args, suite=args.suite)})
            print(loss, runs[-1], flush=True)
        rows.append({"loss": loss, "tried": tried, "setting": best["setting"], "runs": runs})
        rows[-1]["captions"] = captions_under_attack(model, test, args)
    table = make_table(rows, args, len(test[0][: args.max_images]))
    print("\n" + table)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "overwrite")}
    versions = {name: version(name) for name in ("keras-drsl", "keras", "keras-hub", "tensorflow", "numpy")}
    record = {"command": command(args), "settings": settings, "versions": versions, "rows": rows}
    stem.with_suffix(".md").write_text(table)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
    print(f"Written: {stem}.md, .json")


def make_inputs(images, digits):
    """Return the inputs of the model, and the words that it should say next."""
    words = np.stack([np.ones_like(digits), 3 + digits % 2, 5 + (digits > 4), 7 + digits, np.full_like(digits, 2)], 1)
    # The first word is given; the others are the answer.
    is_answer = np.broadcast_to(np.arange(LENGTH) > 0, (len(digits), LENGTH)).astype("int32")
    inputs = {
        "images": np.repeat(images, 3, axis=-1).astype("float32"),
        "token_ids": words[:, :-1].astype("int32"),
        "padding_mask": np.ones((len(digits), LENGTH), "int32"),
        "response_mask": is_answer,
    }
    return inputs, words[:, 1:].astype("int32")


def build_model(size):
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=len(WORDS),
        image_size=8,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=size,
        intermediate_dim=2 * size,
        head_dim=size // 2,
        vit_patch_size=2,
        vit_num_heads=2,
        vit_hidden_dim=size,
        vit_num_layers=1,
        vit_intermediate_dim=2 * size,
    )
    return keras_hub.models.PaliGemmaCausalLM(preprocessor=None, backbone=backbone)


def make_loss(name, options):
    if name == "cross-entropy":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return getattr(keras_drsl, name)(from_logits=True, **options)


def train_model(loss, setting, data, seed, args):
    rate, options = setting
    keras.utils.set_random_seed(seed)
    model = build_model(args.size)
    model.compile(keras.optimizers.Adam(rate), make_loss(loss, options))
    inputs, words = make_inputs(*data)
    model.fit(inputs, words, epochs=args.epochs, batch_size=BATCH, verbose=0)
    return model


def evaluate(model, data, args, *, suite):
    """Return the figures of a model on some images."""
    images, digits = (values[: args.max_images] for values in data)
    inputs, words = make_inputs(images, digits)
    report = keras_drsl.evaluate_robustness(
        model, inputs, words, eps=args.eps, suite=suite, attack_input="images", task="positions", verbose=0
    )
    figures = [report.clean_accuracy, float((describe(model, images) == words).all(1).mean()), report.robust_accuracy]
    warned = [check.name for check in report.checks if check.status in ("warn", "fail")]
    return dict(zip(COLUMNS, figures, strict=True)) | {"checks that warn or fail": warned}


def describe(model, images):
    """Return the words that a model says about images, each the likeliest after those before."""
    inputs, _ = make_inputs(images, np.zeros(len(images), int))
    inputs["token_ids"][:, 1:] = 0
    said = np.zeros((len(images), LENGTH), "int32")
    for position in range(LENGTH):
        logits = ops.convert_to_numpy(model(inputs, training=False))
        said[:, position] = logits[:, position].argmax(-1)
        if position + 1 < LENGTH:
            inputs["token_ids"][:, position + 1] = said[:, position]
    return said


def captions_under_attack(model, data, args):
    """Return what a model says about the first test image before and after an attack."""
    images, digits = (values[:1] for values in data)
    inputs, words = make_inputs(images, digits)
    others = {name: ops.convert_to_tensor(value) for name, value in inputs.items() if name != "images"}

    def logits(images):
        count = ops.shape(images)[0]
        fixed = {name: ops.repeat(value, count, axis=0) for name, value in others.items()}
        return model({"images": images, **fixed}, training=False)

    attacked = APGD(args.eps, loss="margin")(logits, inputs["images"], words)
    said = [describe(model, values[..., :1])[0] for values in (inputs["images"], attacked)]
    names = ("true", "before the attack", "after it")
    return {
        name: " ".join(WORDS[word] for word in caption) for name, caption in zip(names, [words[0], *said], strict=True)
    }


def make_table(rows, args, count):
    lines = [
        f"Captions of digits, {args.epochs} epochs, {args.seeds} seed(s), {count} test images; L-inf, eps "
        f"{args.eps:g}, suite {args.suite}; accuracy in %, mean +- standard deviation over the seeds",
        "",
        f"| loss | setting | {' | '.join(COLUMNS)} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        rate, options = row["setting"]
        setting = ", ".join([f"rate {rate:g}", *(f"{name} {value:g}" for name, value in options.items())])
        cells = [percent([run[column] for run in row["runs"]]) for column in COLUMNS]
        lines.append(f"| {row['loss']} | {setting} | {' | '.join(cells)} |")
    lines += [
        "",
        "The first test image, last seed:",
        "",
        "| loss | true | before the attack | after it |",
        "|---" * 4 + "|",
    ]
    lines += [f"| {row['loss']} | {' | '.join(row['captions'].values())} |" for row in rows]
    return "\n".join(lines) + f"\n\nWritten by `{command(args)}`.\n"


def percent(shares):
    values = 100 * np.array(shares)
    return f"{values.mean():.1f}" + (f" +- {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def command(args):
    names = ("epochs", "seeds", "eps", "size", "max_images", "suite")
    options = " ".join(
        f"--{name.replace('_', '-')} {getattr(args, name):{'' if name == 'suite' else 'g'}}" for name in names
    )
    return f"python examples/vision_language.py {options}"


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each loss; their seeds begin at 0")
    parser.add_argument("--eps", type=float, default=0.1, help="radius of the attack, for pixels in [0, 1]")
    parser.add_argument("--size", type=int, default=32, help="width of the layers")
    parser.add_argument("--max-images", type=int, default=100, help="how many images to attack")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--out", default="runs", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
