import keras
import numpy as np

from studies import networks


def test_resnet18_has_the_weights_of_its_paper():
    sizes = {}
    for name in networks.NAMES:
        model = networks.build(name, (32, 32, 3))
        assert model.output_shape == (None, 10)
        assert model.layers[-1].activation is keras.activations.linear
        sizes[name] = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    # 3x3 convolutions, 1x1 shortcuts where the width changes, scale and shift per normalised channel, and the head.
    widths = (64, 128, 256, 512)
    expected = 27 * 64 + 512 * 10 + 10 + 2 * 512
    for stage, width in enumerate(widths):
        before = widths[max(stage - 1, 0)]
        expected += 9 * width * (before + 3 * width) + (before * width if stage else 0) + 2 * (before + 3 * width)
    assert sizes["resnet18"] == expected
    assert sizes["small_resnet"] < 400_000


def test_augmented_batches_hold_each_image_once():
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 8, 8, 3)).astype("float32"), np.arange(10)
    batches = networks.CroppedAndFlipped(x, y, 4, seed=0)
    images, labels = (np.concatenate(parts) for parts in zip(*(batches[number] for number in range(3)), strict=True))
    assert sorted(labels) == list(range(10))
    flips = 0
    for image, label in zip(images, labels, strict=True):
        padded = np.pad(x[label], ((4, 4), (4, 4), (0, 0)))
        crops = [padded[top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
        straight, flipped = (
            any(np.array_equal(image, crop) for crop in some) for some in (crops, [crop[:, ::-1] for crop in crops])
        )
        assert straight or flipped
        flips += flipped
    assert 0 < flips < 10
    before = [batch[1].tolist() for batch in (batches[0], batches[1])]
    batches.on_epoch_end()
    assert before != [batch[1].tolist() for batch in (batches[0], batches[1])]
