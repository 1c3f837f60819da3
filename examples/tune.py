"""Choose `lam` of DRSLoss and the noise on the inputs by robust accuracy, with KerasTuner.

`RobustnessMonitor` writes `val_robust_accuracy` to the logs of each epoch, so a tuner can choose by it, as by any
metric. It is measured on images that are held out of training, under the quick suite. The best model is evaluated once,
on the test images, under the suite "standard".

Expect a lower robust accuracy on the test images than on the held-out ones: its suite is stronger, and the best of
several trials was chosen.

It takes scikit-learn's digits, without a download. Needs `pip install keras-tuner`.

    python examples/tune.py
    python examples/tune.py --trials 20 --epochs 30
"""

import argparse

import keras
import keras_tuner
import numpy as np
from keras import layers

import keras_drsl


def build(hp):
    """Return a compiled model with the hyperparameters of a trial."""
    noise = hp.Float("noise", 0.0, 0.3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.GaussianNoise(noise),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    loss = keras_drsl.DRSLoss(lam=hp.Float("lam", 0.03, 3.0, sampling="log"))
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def main(arguments=None):
    args = parse_arguments(arguments)
    (x, y), (x_test, y_test) = keras_drsl.datasets.load("digits")
    x_val, y_val = x[-args.held_out :], y[-args.held_out :]
    x, y = x[: -args.held_out], y[: -args.held_out]
    keras.utils.set_random_seed(args.seed)
    tuner = keras_tuner.BayesianOptimization(
        build,
        keras_tuner.Objective("val_robust_accuracy", "max"),
        max_trials=args.trials,
        seed=args.seed,
        directory=args.out,
        project_name="tune",
        overwrite=args.overwrite,
    )
    # Every fifth epoch: an evaluation takes longer than an epoch of this model.
    monitor = keras_drsl.RobustnessMonitor(x_val, y_val, eps=args.eps, every=5)
    tuner.search(x, y, epochs=args.epochs, batch_size=64, callbacks=[monitor], verbose=0)
    for trial in tuner.oracle.get_best_trials(args.trials):
        values = ", ".join(f"{name} {value:.3f}" for name, value in sorted(trial.hyperparameters.values.items()))
        print(f"held-out robust accuracy {trial.score:.1%}: {values}")
    model = tuner.get_best_models(1)[0]
    report = keras_drsl.evaluate_robustness(
        model, x_test, np.asarray(y_test), eps=args.eps, suite=args.suite, max_samples=args.max_samples
    )
    print(report)
    return tuner, report


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--eps", type=float, default=0.15, help="radius of the attacks, in units of the range [0, 1]")
    parser.add_argument("--held-out", type=int, default=300, help="how many training images to choose by")
    parser.add_argument("--suite", choices=("quick", "standard"), default="standard", help="of the last evaluation")
    parser.add_argument("--max-samples", type=int, help="how many test images to evaluate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", help="folder for the trials")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where trials exist")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
