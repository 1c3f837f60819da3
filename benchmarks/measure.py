"""Arguments, interleaved timing, peak memory and the records of the benchmarks and studies."""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

from studies.records import versions


def parse_arguments(doc, arguments=None, *, data_dir=False, more=None):
    """Parse the arguments, and set the backend and the device: call it before Keras is imported.

    Args:
        doc: The description of the script.
        arguments: The arguments, by default those of the process.
        data_dir: Whether the script takes a folder of data sets.
        more: A function that adds arguments of the script to the parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run?")
    parser.add_argument("--out", default="runs", help="folder for the results")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, and print it")
    if data_dir:
        parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST; without it, digits alone")
    if more:
        more(parser)
    args = parser.parse_args(arguments)
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.backend == "jax":
        os.environ["JAX_PLATFORMS"] = "cuda" if args.device == "gpu" else "cpu"
    elif args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        args.device_name = _device_name(args)
    except (ImportError, RuntimeError, IndexError, AssertionError) as error:
        parser.error(f"--backend {args.backend} --device {args.device} is not available: {error}")
    return args


def _device_name(args):
    if args.device == "cpu":
        __import__(args.backend)
        from keras_drsl._backend._common import available_cores

        return f"{platform.machine()}, {available_cores()} cores"
    if args.backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    if args.backend == "torch":
        import torch

        return torch.cuda.get_device_name(0)
    import tensorflow as tf

    return tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])["device_name"]


def interleave(contestants, rounds):
    """Time calls, `rounds` times each, in turns. The first call of each is not counted.

    Each round begins with another contestant. Otherwise the state of caches after one would always affect the same next
    one.

    Args:
        contestants: Maps a name to a function without arguments that returns when its work is done.
        rounds: How many turns each contestant has.

    Returns:
        By name, a list of seconds.
    """
    for call in contestants.values():
        call()
    seconds = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def fit_arguments(x, y, batch_size):
    """Return the data as arguments of `fit`, in their order.

    On TensorFlow they are a data set that is not tuned. Of one that is, the thread that tunes it sleeps 10 ms, 20 ms
    and so on, and the end of each epoch waits until it wakes up: up to as long as the epoch itself.
    """
    import keras

    if keras.config.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size, "shuffle": False}
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).with_options(options)}


def quartiles(values):
    """Return the first quartile, the median and the third quartile."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]


def ratio(seconds, over):
    """Return the ratio of the medians of two contestants, and the quartiles of the ratios turn by turn."""
    by_turn = quartiles([a / b for a, b in zip(seconds, over, strict=True)])
    return {"ratio": quartiles(seconds)[1] / quartiles(over)[1], "spread": [by_turn[0], by_turn[2]]}


def peak_bytes(call):
    """Return how far the memory of this process rises while `call` runs, its result included: the median of five.

    On Linux only.
    """
    page = os.sysconf("SC_PAGE_SIZE")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def one_peak():
        gc.collect()
        before = highest = resident()
        done = threading.Event()

        def watch():
            nonlocal highest
            while not done.is_set():
                highest = max(highest, resident())
                time.sleep(0.0005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            call()
        finally:
            done.set()
            watcher.join()
        return highest - before

    call()
    return quartiles([one_peak() for _ in range(5)])[1]


def memory_in_fresh_process(args):
    """Return what this script prints when it runs again with `--memory`, or None where memory cannot be measured."""
    if args.device != "cpu" or not Path("/proc/self/statm").exists():
        return None
    # TensorFlow's oneDNN keeps freed memory for later, which would hide all peaks after the first.
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    # So does the C library.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    command = [sys.executable, "-m", module, "--backend", args.backend, "--memory", *["--quick"] * args.quick]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def verdict(rows):
    """Print one line per target, and return the targets with `met`."""
    for row in rows:
        row["met"] = row["value"] <= row["target"]
        print(f"{'pass' if row['met'] else 'MISS'}  {row['name']}: {row['value']:.3f} (target <= {row['target']:g})")
    return rows


def command(args, module):
    """Return the command that repeats a run."""
    words = ["python", "-m", module, "--backend", args.backend, "--device", args.device]
    words += ["--dataset", args.dataset] if hasattr(args, "dataset") else []
    words += [f"--{name}" for name in ("design", "family") if getattr(args, name, False)]
    return " ".join(words + ["--quick"] * args.quick)


def write(args, name, record, more_packages=(), *, module=None):
    """Write a record with the command, the device and the versions, and print its path.

    Args:
        args: The arguments of the script.
        name: What the name of the file begins with.
        record: What it holds.
        more_packages: Packages whose versions are recorded too.
        module: The name of the script, where the file has another.
    """
    path = Path(args.out) / f"{name}_{args.backend}_{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "command": command(args, f"benchmarks.{module or name}"),
        "device": args.device_name,
        "versions": versions(more_packages),
    }
    path.write_text(json.dumps(head | record, indent=1))
    print(f"Written: {path}", file=sys.stderr)
    return path
