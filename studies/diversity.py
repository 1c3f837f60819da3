"""Does the diversity of the softmax values say how an attack will end? The paper's finding, tested.

What it shows: for classifiers trained with different losses, and for each test image, how well softmax diversity on the
clean image - each measure, each space - predicts (a) whether the standard suite breaks the image at one radius, and
(b) the smallest radius that breaks it, found by bisection; beside it, the plain baselines top-1 confidence and logit
margin. Over whole models: whether those of less diversity are more robust.

What you should see: within one model, the logit margin and the confidence predict the attack's end well, and so does
diversity in the softmax space, which follows them; in the log space it does not under cross-entropy, and does where a
loss has levelled the wrong classes. Over models it is the other way round: those of less diversity are more robust, but
for label smoothing and logit squeezing, and the margin does not tell.

How long: about six minutes on two cores for six losses on the digits, an hour on one for all with three seeds.

    python examples/diversity_and_attacks.py
    python examples/diversity_and_attacks.py --losses all --seeds 3 --out results --overwrite
    python examples/diversity_and_attacks.py --dataset mnist --losses ce drs_0.3 squentropy --max-images 300
"""

import argparse
import json
import sys
from pathlib import Path

import keras
import networks
import numpy as np
import records
from fit import DEFAULTS
from scipy import stats

import keras_drsl
from keras_drsl.attacks import APGD, Classifier
from keras_drsl.evaluation import datasets

SCRIPT = "examples/diversity_and_attacks.py"
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
# What is looked at on the clean image; each is turned so that more of it should mean more robust.
SCORES = {
    "variance, log space": lambda z, y: -diversity(z, y, "variance", "log_softmax"),
    "std, log space": lambda z, y: -diversity(z, y, "std", "log_softmax"),
    "variance, softmax space": lambda z, y: -diversity(z, y, "variance", "softmax"),
    "std, softmax space": lambda z, y: -diversity(z, y, "std", "softmax"),
    "entropy": lambda z, y: diversity(z, y, "entropy", "log_softmax"),
    # Its logarithm, in a form that tells sure predictions apart.
    "top-1 confidence": lambda z, y: -np.log1p(np.exp(np.sort(z)[:, :-1] - z.max(1, keepdims=True)).sum(1)),
    "logit margin": lambda z, y: np.diff(np.partition(z, -2, axis=1)[:, -2:])[:, 0],
}
LEVELS = 6  # halvings of the bisection
LARGEST = 3  # where it begins, in units of --eps
DRAWS = 500  # of the bootstrap


def main():
    args = parse_arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"diversity_{args.dataset}"
    if stem.with_suffix(".json").exists() and not args.overwrite:
        sys.exit(f"{stem}.json exists. Give another --out, or --overwrite to replace it.")
    try:
        train, (x, y) = datasets.load(args.dataset, args.data_dir)
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    x, y = x[: args.max_images], y[: args.max_images].astype("int64")
    # A run that was stopped goes on where it was.
    begun = records.Begun(f"{stem}.begun.jsonl")
    settings = {name: getattr(args, name) for name in ("dataset", "eps", "epochs", "suite", "max_images")}
    models = []
    for loss in args.losses:
        for seed in range(args.seeds):
            one = {"loss": loss, "seed": seed}
            models.append(
                one | begun.run(settings | one, lambda one=one: look_at(**one, train=train, x=x, y=y, args=args))
            )
    table = make_table(models, len(x), args)
    print("\n" + table)
    record = {"command": records.command(SCRIPT, args), "versions": records.versions(["scipy"]), "models": models}
    stem.with_suffix(".md").write_text(table)
    stem.with_suffix(".json").write_text(json.dumps(record))
    plot(models, stem.with_suffix(".png"), args)
    begun.end()
    print(f"Written: {stem}.md, .json, .png")


def look_at(loss, seed, train, x, y, args):
    """Train a model; of each image what is seen on the clean one, whether it breaks, and at which radius."""
    print(f"{args.dataset}: loss={loss} seed={seed}", flush=True)
    keras.utils.set_random_seed(seed)
    model = networks.build("cnn", x.shape[1:])
    model.compile("adam", LOSSES[loss][1]())
    model.fit(*train, epochs=args.epochs, batch_size=DEFAULTS[args.dataset]["batch_size"], verbose=0)
    report = keras_drsl.evaluate_robustness(model, x, y, eps=args.eps, suite=args.suite, verbose=0)
    withstood = np.array([one is None for one in report.per_example["broken_by"]])
    classifier = Classifier(model)
    # In float64, or the sure ones' probabilities of wrong classes would all be 0.
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
        "radius": [float(f"{one:.6g}") for one in radius],
        "scores": {name: [float(f"{one:.6g}") for one in score(logits, y)] for name, score in SCORES.items()},
    }


def breaking_radius(classifier, x, y, largest):
    """The smallest radius at which two attacks break each image, by bisection: the middle of what is left of [0, max].

    Images that nothing breaks at the largest radius end just below it.
    """
    low, high = np.zeros(len(x)), np.full(len(x), float(largest))
    for _ in range(LEVELS):
        middle = (low + high) / 2
        for eps in np.unique(middle):
            at = np.flatnonzero(middle == eps)
            broken = np.zeros(len(at), bool)
            for knobs in ({"loss": "ce"}, {"loss": "margin", "targeted": True, "targets": 3}):
                left = np.flatnonzero(~broken)
                if len(left):
                    x_adv = APGD(eps, steps=50, **knobs)(classifier, x[at[left]], y[at[left]])
                    broken[left] = classifier.logits(x_adv).argmax(1) != y[at[left]]
            high[at[broken]], low[at[~broken]] = eps, eps
    return (low + high) / 2


def diversity(logits, y, measure, space):
    values = keras_drsl.softmax_diversity(y, logits, measure=measure, space=space, from_logits=True)
    return keras.ops.convert_to_numpy(values)


def within(model, score, rows):
    """Over the images classified correctly: three figures of how well a score tells the end of the attack.

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
    # Mann and Whitney's: how often one that withstands is ranked above one that doesn't.
    auc = (stats.rankdata(values)[withstood].sum() - count * (count + 1) / 2) / (count * (len(kept) - count))
    return rho, partial, auc


def spearman(a, b):
    a, b = stats.rankdata(a), stats.rankdata(b)
    return np.corrcoef(a, b)[0, 1] if a.std() > 0 and b.std() > 0 else np.nan


def mean_within(models, score, rows):
    """Of `within`, the means over models."""
    return np.mean([within(one, score, rows) for one in models], axis=0)


def over_models(models, score):
    """Spearman's rho of the models' mean scores and robust accuracies."""
    return spearman([mean_score(one, score) for one in models], [one["robust"] for one in models])


def mean_score(model, score):
    return float(np.mean(np.array(model["scores"][score])[np.array(model["right"])]))


def with_interval(statistic, count, forms=("+.2f",)):
    """Statistics of rows, each with 95 % of what it gives when the rows are drawn anew, with replacement, as cells."""
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
    """Figures within models, by score, then over models, then the models themselves."""
    lines = [
        f"{args.dataset}: {len(models)} models ({len(args.losses)} losses, {args.seeds} seeds), {images} test images, "
        f"L-inf. rho: Spearman's, of a score on the clean image and the smallest radius that breaks it; AUC: for "
        f"withstanding the suite {args.suite} at eps {args.eps:.4g}, 0.5 is chance. Each score is turned so that more "
        "of it should mean more robust: variances with a minus. Within a model the std ranks images as the variance.",
        "",
    ]
    told = [one for one in models if 5 <= np.sum(one["withstood"]) <= np.sum(one["right"]) - 5]
    for title, some in (("", told), (" of cross-entropy", [one for one in told if one["loss"] == "ce"])):
        if some:
            lines += [
                f"Within a model, mean over {len(some)} model(s){title} of which five images or more fall and stand; "
                "intervals of 95 %, the images drawn anew:",
                "",
                "| score | rho | rho, the logit margin held fixed | AUC |",
                "|---|---|---|---|",
            ]
            for score in SCORES:
                if score.startswith("std"):  # the same order of images as by variance
                    continue
                cells = with_interval(
                    lambda rows, score=score, some=some: mean_within(some, score, rows),
                    images,
                    ("+.2f", "+.2f", ".2f"),  # the last, the AUC, is no correlation
                )
                lines.append(f"| {score} | {' | '.join(cells)} |")
            lines.append("")
    if len(args.losses) > 4:
        others = [loss for loss in args.losses if not loss.startswith("drs")]
        lines += [
            "Over models: rho of a model's mean score and its robust accuracy; intervals of 95 %, the losses, each "
            f"with all its seeds, drawn anew: all {len(args.losses)}, and the {len(others)} that are no DRSLoss.",
            "",
            "| score | all | without DRSLoss |",
            "|---|---|---|",
        ]
        for score in SCORES:
            cells = []
            for losses in (args.losses, others):
                families = [[one for one in models if one["loss"] == loss] for loss in losses]
                cells += with_interval(
                    lambda rows, score=score, families=families: over_models(
                        [one for row in rows for one in families[row]], score
                    ),
                    len(families),
                )
            lines.append(f"| {score} | {' | '.join(cells)} |")
        lines.append("")
    score = "variance, log space"
    lines += [
        "Loss by loss, and the within-model figures of the variance in the log space, which not all losses agree on:",
        "",
        "| loss | clean | robust | median radius | mean variance | rho | rho, the logit margin held fixed |",
        "|---|---|---|---|---|---|---|",
    ]
    for loss in args.losses:
        mine = [one for one in models if one["loss"] == loss]
        clean, robust = (100 * np.mean([one[name] for one in mine]) for name in ("clean", "robust"))
        radius = np.median([one["radius"] for one in mine])
        variance = -np.mean([mean_score(one, score) for one in mine])
        rhos = with_interval(lambda rows, mine=mine: mean_within(mine, score, rows)[:2], images, ("+.2f", "+.2f"))
        cells = [f"{clean:.1f}", f"{robust:.1f}", f"{radius:.3f}", f"{variance:.3g}", *rhos]
        lines.append(f"| {LOSSES[loss][0]} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nWritten by `{records.command(SCRIPT, args)}`.\n"


def plot(models, path, args):
    """Left: single images, two losses; right: models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    score = "variance, log space"
    for place, loss in enumerate(dict.fromkeys((args.losses[0], args.losses[-1]))):
        one = next(one for one in models if one["loss"] == loss)
        kept = np.array(one["right"])
        values = -np.array(one["scores"][score])[kept]
        left.plot(values, np.array(one["radius"])[kept], ".", ms=4, alpha=0.5, color=f"C{place}", label=LOSSES[loss][0])
    left.set(xlabel="variance of the log-softmax values of the wrong classes", ylabel="smallest radius that breaks it")
    left.set(xscale="log", title=f"{args.dataset}: single images")
    for place, loss in enumerate(args.losses):
        mine = [one for one in models if one["loss"] == loss]
        values = [-mean_score(one, score) for one in mine]
        color = plt.get_cmap("tab20")(place)
        right.plot(values, [100 * one["robust"] for one in mine], "o", color=color, label=LOSSES[loss][0])
    right.set(xscale="log", xlabel="the same, mean over images", ylabel=f"robust accuracy at {args.eps:.3g} (%)")
    right.set_title("models")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    # Outside, or it would hide models.
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DEFAULTS, default="digits")
    names = ", ".join(f"{name} ({title})" for name, (title, _) in LOSSES.items())
    names += f"; by default {' '.join(FEW)}"
    parser.add_argument("--losses", choices=(*LOSSES, "all"), nargs="+", default=FEW, help=f"some of {names}")
    parser.add_argument("--seeds", type=int, default=1, help="how many models of each loss")
    parser.add_argument("--eps", type=float, help="radius of the suite, L-inf, the input range being [0, 1]")
    parser.add_argument("--epochs", type=int, help="of the training; by default those of examples/fit.py")
    parser.add_argument("--suite", choices=("quick", "standard"), default="standard", help="of attacks")
    parser.add_argument("--max-images", type=int, help="how many test images, the first ones; by default all")
    parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST or CIFAR-10")
    parser.add_argument("--out", default="runs", help="folder for the table, the figure and the JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in --out")
    args = parser.parse_args()
    args.losses = list(LOSSES) if "all" in args.losses else args.losses
    args.eps = DEFAULTS[args.dataset]["eps"] if args.eps is None else args.eps
    args.epochs = DEFAULTS[args.dataset]["epochs"] if args.epochs is None else args.epochs
    if not 0 < args.eps <= 1 / LARGEST:
        parser.error(f"--eps must lie in (0, 1/{LARGEST}]. Received: {args.eps}")
    for name in ("seeds", "epochs", "max_images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive. Received: {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
