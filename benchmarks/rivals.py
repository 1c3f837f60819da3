"""The models, their copies in torch, and the attacks of other libraries."""

import numpy as np

LAM = 0.3


def small_cnn(shape, classes=10):
    """Return a small CNN that returns logits."""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input(shape),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )


def train(kind, x, y, *, epochs, eps, make=small_cnn):
    """Train a model with cross-entropy ("ce"), with DRSLoss ("drs"), or on the images of PGD ("adversarial")."""
    import keras

    import keras_drsl

    keras.utils.set_random_seed(0)
    model = trained = make(x.shape[1:])
    if kind == "adversarial":
        # From nothing up to eps over the first half, or it never learns.
        trained = keras_drsl.AdversarialTraining(model, eps, method="pgd", steps=5, warmup_epochs=epochs // 2)
    loss = keras_drsl.DRSLoss(LAM, from_logits=True)
    if kind != "drs":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile("adam", loss)
    trained.fit(x, y, epochs=epochs, batch_size=64, verbose=0)
    return model


def fresh_copy(model):
    """Return a copy with the same weights, which keeps none of the programs that were compiled for the model."""
    import keras

    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def torch_copy(model):
    """Return the network as a torch module with the same weights, for images with the channels first."""
    import torch

    layers, shape = [], None
    for layer in model.layers:
        weights = [torch.tensor(np.asarray(weight)) for weight in layer.get_weights()]
        name = type(layer).__name__
        if name == "GaussianNoise":
            continue  # in training only
        if name == "Conv2D":
            size = weights[0].shape
            copy = torch.nn.Conv2d(size[2], size[3], tuple(size[:2]), padding="same")
            weights[0] = weights[0].permute(3, 2, 0, 1)
        elif name == "Dense":
            copy = torch.nn.Linear(*weights[0].shape)
            if shape is not None:
                # Keras flattens (height, width, channels), torch (channels, height, width).
                height, width, channels = shape
                weights[0] = weights[0].reshape(height, width, channels, -1).permute(2, 0, 1, 3).flatten(0, 2)
                shape = None
            weights[0] = weights[0].T
        elif name == "MaxPooling2D":
            copy = torch.nn.MaxPool2d(layer.pool_size)
        elif name == "Flatten":
            copy, shape = torch.nn.Flatten(), layer.input.shape[1:]
        else:
            raise ValueError(f"no copy for a layer of type {name}")
        if weights:
            with torch.no_grad():
                copy.weight.copy_(weights[0])
                copy.bias.copy_(weights[1])
        layers.append(copy)
        if name != "Flatten" and getattr(layer, "activation", None) is not None and layer.activation.__name__ == "relu":
            layers.append(torch.nn.ReLU())
    return torch.nn.Sequential(*layers).eval()


def to_torch(x, device="cpu"):
    """Return images with the channels first."""
    import torch

    return torch.tensor(np.moveaxis(x, -1, 1).copy(), device=device)


def from_torch(x):
    return np.moveaxis(x.detach().cpu().numpy(), 1, -1)


def torchattacks_autoattack(copy, x, y, eps, device="cpu", seed=0):
    """Run the AutoAttack (standard) of torchattacks."""
    import torch
    import torchattacks

    attack = torchattacks.AutoAttack(copy.to(device), norm="Linf", eps=eps, version="standard", n_classes=10, seed=seed)
    return from_torch(attack(to_torch(x, device), torch.tensor(y, device=device).long()))


def adv_lib_fmn_distances(copy, x, y, norm, steps):
    """Return the distances that adv-lib's FMN finds, infinity where it finds no misclassified point."""
    import sys
    import types

    import torch

    # It imports these for other attacks and for plots.
    for name in ("torchvision", "torchvision.models", "visdom"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    from adv_lib.attacks.fast_minimum_norm import fmn

    images, labels = to_torch(x), torch.tensor(y).long()
    points = fmn(copy, images, labels, float(norm), steps=steps)
    with torch.no_grad():
        wrong = (copy(points).argmax(1) != labels).numpy()
    delta = (points - images).flatten(1).double()
    return np.where(wrong, delta.norm(p=float(norm), dim=1).numpy(), np.inf)


def art_classifier(model, **options):
    import keras
    from art.estimators.classification import TensorFlowV2Classifier

    return TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=model.input_shape[1:],
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
        **options,
    )


def art_pgd(classifier, x, y, eps, steps):
    from art.attacks.evasion import ProjectedGradientDescent

    attack = ProjectedGradientDescent(
        classifier,
        eps=eps,
        eps_step=2.5 * eps / steps,
        max_iter=steps,
        num_random_init=1,
        batch_size=256,
        verbose=False,
    )
    return attack.generate(x, y)


def art_autoattack(classifier, x, y, eps):
    """ART's AutoAttack with the attacks of its default that work without estimates of the model: see its source."""
    from art.attacks.evasion import AutoAttack

    attack = AutoAttack(classifier, norm=np.inf, eps=eps, eps_step=2 * eps, batch_size=256)
    return attack.generate(x, y)


def foolbox_pgd(model, x, y, eps, steps):
    import foolbox
    import tensorflow as tf

    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps)
    bounded = foolbox.TensorFlowModel(model, bounds=(0, 1))
    return attack(bounded, tf.constant(x), tf.constant(y), epsilons=eps)[1].numpy()


def cleverhans_pgd(model, x, y, eps, steps):
    """Run PGD as shipped, except for the true labels and a random start."""
    import tensorflow as tf
    from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

    step = 2.5 * eps / steps
    return projected_gradient_descent(
        model, tf.constant(x), eps, step, steps, np.inf, clip_min=0.0, clip_max=1.0, y=tf.constant(y), rand_init=1.0,
        rand_minmax=eps, sanity_checks=False,
    ).numpy()  # fmt: skip
