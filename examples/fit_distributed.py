"""Train with DRSLoss on several workers, as tf.distribute.MultiWorkerMirroredStrategy does on a cluster.

A loss that returns one value per sample needs no change for many machines. Expected: the same loss, step by step, for
any number of workers, because the batch of each step is only divided between them.

Half a minute. By default, it starts two workers as processes of this machine, which communicate over the loopback
address:

    python examples/fit_distributed.py
    python examples/fit_distributed.py --workers 1

On a real cluster, start this script once on each machine with `TF_CONFIG` set; each is then one worker:

    TF_CONFIG='{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'

Set `index` to 1 on the second host, and use the same `--steps` and `--batch-size` everywhere. Keras 3's `fit` does not
run under this strategy, where it builds the model symbolically, so the loop uses `strategy.run`.
"""

import argparse
import faulthandler
import json
import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes to start when TF_CONFIG is not set")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="of all workers together")
    parser.add_argument("--lam", type=float, default=0.3)
    parser.add_argument("--out", help="a .npz file for the trained weights, written by the first worker")
    parser.add_argument(
        "--time-limit", type=float, default=240, help="seconds until a worker, or this command, gives up"
    )
    args = parser.parse_args()
    if args.workers < 1 or args.steps < 1:
        parser.error(f"--workers and --steps must be positive. Received: {args.workers}, {args.steps}")
    if "TF_CONFIG" in os.environ:
        work(args)
    else:
        sys.exit(start_workers(args))


def start_workers(args):
    """Start the workers here, wait for them, and return 1 if one failed, else 0."""
    addresses = free_addresses(args.workers)
    workers = []
    for index in range(args.workers):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = os.environ | {"TF_CONFIG": json.dumps(config), "GRPC_ENABLE_FORK_SUPPORT": "0"}
        workers.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    end = time.monotonic() + args.time_limit
    try:
        while True:
            statuses = [worker.poll() for worker in workers]
            for index, status in enumerate(statuses):
                if status:
                    print(f"Worker {index} ended with status {status}; stopping.", file=sys.stderr)
                    return 1
            if None not in statuses:
                return 0
            if time.monotonic() > end:
                print(f"No end after {args.time_limit:g} s; stopping the workers.", file=sys.stderr)
                return 1
            time.sleep(0.1)
    finally:
        # A worker waits forever for another that died.
        for worker in workers:
            worker.kill()


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    return addresses


def work(args):
    """Run one worker on its part of every batch; the gradients are summed over all workers."""
    config = json.loads(os.environ["TF_CONFIG"])
    index, workers = config["task"]["index"], len(config["cluster"]["worker"])
    if args.batch_size % workers:
        sys.exit(f"--batch-size must be a multiple of the {workers} workers. Received: --batch-size {args.batch_size}")

    print(f"worker {index} waits for all {workers} of TF_CONFIG, no longer than {args.time_limit:g} s", flush=True)
    import tensorflow as tf

    # A worker waits in native code for others that are missing, and no exception reaches it there.
    faulthandler.dump_traceback_later(args.time_limit, exit=True)
    # The strategy must be created before anything else of TensorFlow runs.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    import keras
    import numpy as np

    import keras_drsl

    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.steps, workers, args.batch_size // workers, 20)).astype("float32")
    y = (x @ rng.normal(size=(20, 80))).argmax(-1)
    mine = tf.data.Dataset.from_tensor_slices((x[:, index], y[:, index]))

    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(80)])
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
    loss_fn = keras_drsl.DRSLoss(args.lam, from_logits=True)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            # Keras divides the mean over the batch by the number of workers, so the losses of the workers sum up.
            loss = loss_fn(y, model(x, training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    @tf.function
    def step(x, y):
        losses = strategy.run(replica_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    for number, (x, y) in enumerate(strategy.distribute_datasets_from_function(lambda context: mine)):
        loss = float(step(x, y))
        if index == 0:
            print(f"step {number}: loss {loss:.6f}", flush=True)
    if index == 0 and args.out:
        np.savez(args.out, *model.get_weights())
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
