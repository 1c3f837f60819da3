"""Test that many devices and many processes train the same weights as one."""

from pathlib import Path

import numpy as np
import pytest

from tests.backends import on_jax, on_tensorflow
from tests.helpers import run_python

EXAMPLE = Path(__file__).parents[1] / "examples" / "fit_distributed.py"


@pytest.mark.slow
@on_tensorflow
def test_two_workers_train_the_same_weights_as_one(tmp_path):
    weights = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.npz"
        run_python(EXAMPLE, "--workers", workers, "--steps", 4, "--out", path)
        weights.append(np.load(path))
    assert len(weights[0].files) == 4
    for name in weights[0].files:
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-5, atol=1e-6)


@on_tensorflow
def test_a_failing_worker_stops_the_others():
    done = run_python(EXAMPLE, "--batch-size", 3, "--time-limit", 250, check=False)
    assert done.returncode != 0
    assert "--batch-size must be a multiple of the 2 workers" in done.stderr
    assert "stopping" in done.stderr


@on_tensorflow
def test_workers_are_stopped_at_the_time_limit():
    done = run_python(EXAMPLE, "--steps", 1_000, "--time-limit", 1, check=False)
    assert done.returncode == 1
    assert "No end after 1 s; stopping the workers." in done.stderr


@on_tensorflow
@pytest.mark.more
def test_a_worker_waits_no_longer_than_the_limit():
    config = '{"cluster": {"worker": ["127.0.0.1:47831", "127.0.0.1:47832"]}, "task": {"type": "worker", "index": 0}}'
    done = run_python(EXAMPLE, "--time-limit", 15, env={"TF_CONFIG": config}, check=False)
    assert done.returncode == 1
    assert "worker 0 waits for all 2 of TF_CONFIG, no longer than 15 s" in done.stdout
    assert "Timeout" in done.stderr


@on_jax
def test_two_jax_devices_train_the_same_weights_as_one():
    code = """
    import jax, keras, numpy as np, keras_drsl
    assert len(jax.devices()) == 2
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 3)).astype("float32"), rng.integers(0, 80, 24)

    def train(distribution):
        keras.distribution.set_distribution(distribution)
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(80)])
        model.compile(optimizer=keras.optimizers.SGD(0.5), loss=keras_drsl.DRSLoss(from_logits=True))
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        return [np.asarray(weight) for weight in model.get_weights()]

    one = train(None)
    two = train(keras.distribution.DataParallel(devices=jax.devices()))
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    # Each device computes its own rows, and reads none of another device.
    rows = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), "batch"), jax.sharding.PartitionSpec("batch"))
    z = jax.device_put(rng.normal(size=(1024, 1000)).astype("float32"), rows)
    ids = jax.device_put(rng.integers(0, 1000, 1024), rows)
    total = lambda z, ids: keras_drsl.drs_loss(ids, z, from_logits=True).sum()
    program = jax.jit(jax.value_and_grad(total)).lower(z, ids).compile()
    assert "all-gather" not in program.as_text()
    """
    run_python(code, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
