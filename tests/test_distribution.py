"""Many devices and many processes end with the weights of one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from tests.backends import BACKEND, on_tensorflow

EXAMPLE = Path(__file__).parents[1] / "examples" / "fit_distributed.py"


def start(*arguments, **options):
    command = [sys.executable, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@on_tensorflow
def test_two_worker_processes_end_with_the_weights_of_one(tmp_path):
    weights = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.npz"
        done = start("--workers", workers, "--steps", 4, "--out", path)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(np.load(path))
    assert len(weights[0].files) == 4
    for name in weights[0].files:
        np.testing.assert_allclose(weights[1][name], weights[0][name], rtol=1e-5, atol=1e-6)


@on_tensorflow
def test_a_worker_that_fails_ends_the_others_and_the_command_with_an_error():
    done = start("--batch-size", 3, "--time-limit", 100)
    assert done.returncode != 0
    assert "--batch-size must be a multiple of the 2 workers" in done.stderr
    assert "stopping" in done.stderr


@on_tensorflow
def test_workers_that_do_not_end_are_stopped():
    done = start("--steps", 1_000, "--time-limit", 1)
    assert done.returncode == 1
    assert "No end after 1 s; stopping the workers." in done.stderr


@on_tensorflow
def test_a_worker_of_a_cluster_gives_up_on_a_missing_one():
    config = '{"cluster": {"worker": ["127.0.0.1:47831", "127.0.0.1:47832"]}, "task": {"type": "worker", "index": 0}}'
    done = start("--time-limit", 15, env=os.environ | {"TF_CONFIG": config})
    assert done.returncode == 1
    assert "worker 0 waits for all 2 of TF_CONFIG, no longer than 15 s" in done.stdout
    assert "Timeout" in done.stderr


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is for JAX")
def test_data_parallel_on_two_devices_of_jax_ends_with_the_weights_of_one():
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

    # Each device has its rows, and never asks for those of another.
    rows = jax.sharding.NamedSharding(jax.sharding.Mesh(jax.devices(), "batch"), jax.sharding.PartitionSpec("batch"))
    z = jax.device_put(rng.normal(size=(1024, 1000)).astype("float32"), rows)
    ids = jax.device_put(rng.integers(0, 1000, 1024), rows)
    total = lambda z, ids: keras_drsl.drs_loss(ids, z, from_logits=True).sum()
    program = jax.jit(jax.value_and_grad(total)).lower(z, ids).compile()
    assert "all-gather" not in program.as_text()
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
