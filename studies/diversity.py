"""Test the finding of the paper: does the diversity of the softmax values predict how an attack ends?

For classifiers trained with different losses, and for each test image, the study measures how well softmax diversity on
the clean image (each measure, each space) predicts (a) whether the standard suite breaks the image at one radius, and
(b) the smallest radius that breaks it, found by bisection. The plain baselines are top-1 confidence and the logit
margin. Over whole models: whether models of less diversity are more robust.

Expected: within one model, logit margin and confidence predict the end of an attack well, and so does diversity in the
softmax space, which follows them. In the log space it does not under cross-entropy, and does where a loss has made the
non-true classes equal. Over models the order is reversed: models of less diversity are more robust, except for label
smoothing and logit squeezing, and the margin predicts nothing.

On two cores: about six minutes for six losses on digits, an hour on one core for all losses with three seeds.

    python -m studies.diversity
    python -m studies.diversity --losses all --seeds 3 --out results --overwrite
    python -m studies.diversity --dataset mnist --losses ce drs_0.3 squentropy --max-images 300
"""

import argparse
import json
import sys
from pathlib import Path

import keras
import numpy as np
from scipy import stats

import keras_drsl
from keras_drsl import datasets
from keras_drsl.attacks import APGD
from keras_drsl.models import Classifier
from studies import networks, records
from studies.recipes import PLAIN
from studies.runner import PartialRuns

MODULE = "studies.diversity"
LOSSES = {
    "ce": ("cross-entropy", lambda: keras_drsl.DRSLoss(0.0, from_logits=True)),
    "ls": ("label smoothing 0.1", lambda: keras_drsl.DRSLoss(0.0, from_logits=True, label_smoothing=0.1)),
    "squentropy": ("Squentropy", lambda: keras_drsl.Squentropy(from_logits=True)),
    "cot": ("complement objective", lambda: keras_drsl.ComplementObjective(from_logits=True)),
    "pc": ("prob. compact loss", lambda: keras_drsl.ProbabilisticallyCompactLoss(from_logits=True)),
    "prs": ("PRSLoss, lam 0.001", lambda: keras_drsl.PRSLoss(1e-3, from_logits=True)),
    "zloss": ("z-loss, lam 0.01", lambda: keras_drsl.ZLoss(0.01, from_logits=True)),
    "gce": ("guided complement entropy", lambda: keras_drsl.GuidedComplementEntropy(from_logits=True)),
    "squeezing": ("logit squeezing 0.1", lambda: keras_drsl.LogitSqueezing(0.1, from_logits=True)),
    "drs_0.1": ("DRSLoss, lam 0.1", lambda: keras_drsl.DRSLoss(0.1, from_logits=True)),
    "drs_0.3": ("DRSLoss, lam 0.3", lambda: keras_drsl.DRSLoss(0.3, from_logits=True)),
    "drs_1": ("DRSLoss, lam 1", lambda: keras_drsl.DRSLoss(1.0, from_logits=True)),
    "drs_3": ("DRSLoss, lam 3", lambda: keras_drsl.DRSLoss(3.0, from_logits=True)),
}
FEW = ["ce", "ls", "squentropy", "gce", "drs_0.3", "drs_3"]
# The scores of a clean image. Each has the sign with which more of it should mean more robust.
SCORES = {
    "variance, log space": lambda z, y: -diversity(z, y, "variance", "log_softmax"),
    "std, log space": lambda z, y: -diversity(z, y, "std", "log_softmax"),
    "variance, softmax space": lambda z, y: -diversity(z, y, "variance", "softmax"),
    "std, softmax space": lambda z, y: -diversity(z, y, "std", "softmax"),
    "entropy": lambda z, y: diversity(z, y, "entropy", "log_softmax"),
    # The logarithm of the confidence, in a form that separates confident predictions.
    "top-1 confidence": lambda z, y: -np.log1p(np.exp(np.sort(z)[:, :-1] - z.max(1, keepdims=True)).sum(1)),
    "logit margin": lambda z, y: np.diff(np.partition(z, -2, axis=1)[:, -2:])[:, 0],
}
LEVELS = 6  # how often the bisection halves the radius
LARGEST = 3  # the radius where the bisection begins, in units of --eps
DRAWS = 500  # how many samples the bootstrap draws


def main(arguments=None, measure=None):
    """Run the study; `measure` replaces the training and evaluation of a model in tests."""
    args = parse_arguments(arguments)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"diversity_{args.dataset}"
    if stem.with_suffix(".json").exists() and not (args.overwrite or args.redraw):
        sys.exit(f"{stem}.json exists. Give another --out, --redraw to make its table again, or --overwrite.")
    if args.redraw:
        record = json.loads(stem.with_suffix(".json").read_text())
        models = record["models"]
        images = len(models[0]["radius"])
    else:
        models, images = train_all(args, stem, measure or measure_model)
        record = {"command": records.command(MODULE, args), "versions": records.versions(["scipy"]), "models": models}
        stem.with_suffix(".json").write_text(json.dumps(record))
    table = make_table(models, images, args) + f"\nWritten by `{record['command']}`.\n"
    print("\n" + table)
    stem.with_suffix(".md").write_text(table)
    print(f"Written: {stem}.md, .json")


def train_all(args, stem, measure):
    """Train and measure all models, or continue a study that was stopped."""
    try:
        train, (x, y) = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    x, y = x[: args.max_images], y[: args.max_images].astype("int64")
    runs = PartialRuns(f"{stem}.begun.jsonl")
    settings = {name: getattr(args, name) for name in ("dataset", "eps", "epochs", "suite", "max_images")}
    models = []
    for loss in args.losses:
        for seed in range(args.seeds):
            job = {"loss": loss, "seed": seed}
            measured = runs.run(settings | job, lambda job=job: measure(**job, train=train, x=x, y=y, args=args))
            models.append(job | measured)
    runs.end()
    return models, len(x)


def measure_model(loss, seed, train, x, y, args):
    """Train a model, and measure for each image its scores, whether it breaks, and at which radius."""
    print(f"{args.dataset}: loss={loss} seed={seed}", flush=True)
    keras.utils.set_random_seed(seed)
    model = networks.build("cnn", x.shape[1:])
    model.compile("adam", LOSSES[loss][1]())
    model.fit(*train, epochs=args.epochs, batch_size=PLAIN[args.dataset]["batch_size"], verbose=0)
    report = keras_drsl.evaluate_robustness(model, x, y, eps=args.eps, suite=args.suite, verbose=0)
    withstood = np.array([name is None for name in report.per_example["broken_by"]])
    classifier = Classifier(model)
    # In float32, the non-true probabilities of confident predictions would all be 0.
    logits = classifier.logits(x).astype("float64")
    right = logits.argmax(1) == y
    radius = np.zeros(len(x))
    radius[right] = breaking_radius(classifier, x[right], y[right], LARGEST * args.eps)
    print(f"  clean {right.mean():.1%}, robust {withstood.mean():.1%}, median radius {np.median(radius):.3f}")
    return {
        "clean": float(right.mean()),
        "robust": float(withstood.mean()),
        "right": right.tolist(),
        "withstood": withstood.tolist(),
        "radius": [float(f"{value:.6g}") for value in radius],
        "scores": {name: [float(f"{value:.6g}") for value in score(logits, y)] for name, score in SCORES.items()},
    }


def breaking_radius(classifier, x, y, largest):
    """Return the smallest radius at which two attacks break each image, by bisection: the middle of the last interval.

    Images that no attack breaks at the largest radius end just below it.
    """
    low, high = np.zeros(len(x)), np.full(len(x), float(largest))
    for _ in range(LEVELS):
        middle = (low + high) / 2
        for eps in np.unique(middle):
            at = np.flatnonzero(middle == eps)
            broken = np.zeros(len(at), bool)
            for options in ({"loss": "ce"}, {"loss": "margin", "targeted": True, "targets": 3}):
                left = np.flatnonzero(~broken)
                if len(left):
                    x_adv = APGD(eps, steps=50, **options)(classifier, x[at[left]], y[at[left]])
                    broken[left] = classifier.logits(x_adv).argmax(1) != y[at[left]]
            high[at[broken]], low[at[~broken]] = eps, eps
    return (low + high) / 2


def diversity(logits, y, measure, space):
    values = keras_drsl.softmax_diversity(y, logits, measure=measure, space=space, from_logits=True)
    return keras.ops.convert_to_numpy(values)


def within(model, score, rows):
    """Return how well a score predicts the end of the attack, over the images that are classified correctly.

    Returns:
        Spearman's rho with the radius; the same with the logit margin held fixed; the AUC for withstanding the suite.
    """
    kept = rows[np.array(model["right"])[rows]]
    values, margin = (np.array(model["scores"][name])[kept] for name in (score, "logit margin"))
    radius, withstood = np.array(model["radius"])[kept], np.array(model["withstood"])[kept]
    rho, by_margin, of_margin = spearman(values, radius), spearman(values, margin), spearman(margin, radius)
    rest = (1 - by_margin**2) * (1 - of_margin**2)
    partial = np.nan if score == "logit margin" or rest <= 0 else (rho - by_margin * of_margin) / np.sqrt(rest)
    count = withstood.sum()
    if count in (0, len(kept)):
        return rho, partial, np.nan
    # The statistic of Mann and Whitney: how often a robust image ranks above one that is broken.
    auc = (stats.rankdata(values)[withstood].sum() - count * (count + 1) / 2) / (count * (len(kept) - count))
    return rho, partial, auc


def spearman(a, b):
    a, b = stats.rankdata(a), stats.rankdata(b)
    return np.corrcoef(a, b)[0, 1] if a.std() > 0 and b.std() > 0 else np.nan


def mean_within(models, score, rows):
    """Return the means of `within` over models."""
    return np.mean([within(model, score, rows) for model in models], axis=0)


def over_models(models, score):
    """Return Spearman's rho of the models' mean scores and robust accuracies."""
    return spearman([mean_score(model, score) for model in models], [model["robust"] for model in models])


def mean_score(model, score):
    return float(np.mean(np.array(model["scores"][score])[np.array(model["right"])]))


def with_interval(statistic, count, forms=("+.2f",)):
    """Return statistics of rows as cells, each with the 95 % interval of a bootstrap over the rows."""
    rng = np.random.default_rng(0)
    draws = np.array([np.atleast_1d(statistic(rng.integers(0, count, count))) for _ in range(DRAWS)])
    cells = []
    for value, column, form in zip(np.atleast_1d(statistic(np.arange(count))), draws.T, forms, strict=True):
        if np.isnan(value):
            cells.append("")
        else:
            low, high = np.nanpercentile(column, [2.5, 97.5])
            cells.append(f"{value:{form}} ({low:{form}} to {high:{form}})")
    return cells


def make_table(models, images, args):
    """Return a Markdown table: figures within models by score, then over models, then the models themselves."""
    losses = list(dict.fromkeys(model["loss"] for model in models))
    seeds = len({model["seed"] for model in models})
    introduction = [
        f"{args.dataset}: {len(models)} models ({len(losses)} losses, {seeds} seeds), {images} test images, L-inf.",
        "rho: Spearman's, of a score on the clean image and the smallest radius that breaks it.",
        f"AUC: for withstanding the suite {args.suite} at eps {args.eps:.4g}; 0.5 is chance.",
        "Each score has the sign with which more of it should mean more robust: variances have a minus.",
        "Within a model, the std ranks images as the variance does.",
    ]
    lines = [
        " ".join(introduction),
        "",
        *within_tables(models, images),
        *(over_table(models, losses) if len(losses) > 4 else []),
        *loss_table(models, losses, images),
    ]
    return "\n".join(lines) + "\n"


def within_tables(models, images):
    """Return the lines of the figures within models: of all models, and of cross-entropy."""
    lines = []
    clear = [model for model in models if 5 <= np.sum(model["withstood"]) <= np.sum(model["right"]) - 5]
    plain = [model for model in clear if model["loss"] == "ce"]
    for title, some in (("", clear), (" of cross-entropy", plain)):
        if not some:
            continue
        lines += [
            f"Within a model, mean over {len(some)} model(s){title} with at least five broken and five robust images; "
            "95 % intervals by bootstrap over the images:",
            "",
            "| score | rho | rho, the logit margin held fixed | AUC |",
            "|---|---|---|---|",
        ]
        for score in SCORES:
            if score.startswith("std"):  # ranks images as the variance does
                continue
            cells = with_interval(
                lambda rows, score=score, some=some: mean_within(some, score, rows),
                images,
                ("+.2f", "+.2f", ".2f"),  # the AUC is no correlation
            )
            lines.append(f"| {score} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def over_table(models, losses):
    """Return the lines of the figures over models."""
    others = [loss for loss in losses if not loss.startswith("drs")]
    lines = [
        "Over models: rho of the mean score of a model and its robust accuracy; 95 % intervals by bootstrap over the "
        f"losses, each with all its seeds: all {len(losses)}, and the {len(others)} that are no DRSLoss.",
        "",
        "| score | all | without DRSLoss |",
        "|---|---|---|",
    ]
    for score in SCORES:
        cells = []
        for some in (losses, others):
            families = [[model for model in models if model["loss"] == loss] for loss in some]
            cells += with_interval(
                lambda rows, score=score, families=families: over_models(
                    [model for row in rows for model in families[row]], score
                ),
                len(families),
            )
        lines.append(f"| {score} | {' | '.join(cells)} |")
    return [*lines, ""]


def loss_table(models, losses, images):
    """Return the lines of the models, by loss."""
    score = "variance, log space"
    lines = [
        "By loss, with the within-model figures of the variance in the log space, which differ between losses:",
        "",
        "| loss | clean | robust | median radius | mean variance | rho | rho, the logit margin held fixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for loss in losses:
        mine = [model for model in models if model["loss"] == loss]
        clean, robust = (100 * np.mean([model[name] for model in mine]) for name in ("clean", "robust"))
        radius = np.median([model["radius"] for model in mine])
        variance = -np.mean([mean_score(model, score) for model in mine])
        rhos = with_interval(lambda rows, mine=mine: mean_within(mine, score, rows)[:2], images, ("+.2f", "+.2f"))
        cells = [f"{clean:.1f}", f"{robust:.1f}", f"{radius:.3f}", f"{variance:.3g}", *rhos]
        lines.append(f"| {LOSSES[loss][0]} | {' | '.join(cells)} |")
    return lines


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=PLAIN, default="digits")
    names = ", ".join(f"{name} ({title})" for name, (title, _) in LOSSES.items())
    names += f"; by default {' '.join(FEW)}"
    parser.add_argument("--losses", choices=(*LOSSES, "all"), nargs="+", default=FEW, help=f"some of {names}")
    parser.add_argument("--seeds", type=int, default=1, help="how many models of each loss")
    parser.add_argument("--eps", type=float, help="radius of the suite, L-inf, the input range being [0, 1]")
    parser.add_argument("--epochs", type=int, help="epochs of the training")
    parser.add_argument("--suite", choices=("quick", "standard"), default="standard", help="of attacks")
    parser.add_argument("--max-images", type=int, help="how many test images, the first ones; by default all")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for the table and the JSON")
    parser.add_argument("--redraw", action="store_true", help="make the table of a finished run in --out again")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args(arguments)
    args.losses = list(LOSSES) if "all" in args.losses else args.losses
    args.eps = PLAIN[args.dataset]["eps"] if args.eps is None else args.eps
    args.epochs = PLAIN[args.dataset]["epochs"] if args.epochs is None else args.epochs
    if not 0 < args.eps <= 1 / LARGEST:
        parser.error(f"--eps must lie in (0, 1/{LARGEST}]. Received: {args.eps}")
    for name in ("seeds", "epochs", "max_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
