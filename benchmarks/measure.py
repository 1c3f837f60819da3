"""What the benchmarks share: arguments, interleaved timing, peak memory, and the record they write."""

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

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from records import versions


def arguments(doc, *, data_dir=False, more=None):
    """Parse the arguments; sets the backend and the device, so it must run before Keras is imported.

    Args:
        doc: the script's description.
        data_dir: whether it takes a folder of data sets.
        more: a function that adds a script's own arguments to the parser.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run?")
    parser.add_argument("--out", default="runs", help="folder for the JSON and the figure")
    parser.add_argument("--memory", action="store_true", help="measure memory alone, and print it")
    if data_dir:
        parser.add_argument("--data-dir", help="where tensorflow-datasets has MNIST; without it, digits alone")
    if more:
        more(parser)
    args = parser.parse_args()
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if args.backend == "jax":
        os.environ["JAX_PLATFORMS"] = "cuda" if args.device == "gpu" else "cpu"
    elif args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        args.device_name = _device_name(args)
    except (ImportError, RuntimeError, IndexError, AssertionError) as error:
        parser.error(f"--backend {args.backend} --device {args.device} is not at hand: {error}")
    return args


def _device_name(args):
    if args.device == "cpu":
        __import__(args.backend)
        return f"{platform.machine()}, {os.cpu_count()} cores"
    if args.backend == "jax":
        import jax

        return jax.devices()[0].device_kind
    if args.backend == "torch":
        import torch

        return torch.cuda.get_device_name(0)
    import tensorflow as tf

    return tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])["device_name"]


def interleave(contestants, rounds):
    """Seconds of each call, `rounds` a contestant, the contestants taking turns; a first call each is not counted.

    Each round begins with another of them: what one leaves behind would always meet the same next one.

    Args:
        contestants: a dict from name to a function without arguments that returns when its work is done.
        rounds: how many turns each has.

    Returns:
        A dict from name to a list of seconds.
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


def quartiles(values):
    """The first quartile, the median and the third."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]


def ratio(seconds, over):
    """The ratio of two contestants' medians, and the quartiles of the ratios turn by turn."""
    by_turn = quartiles([a / b for a, b in zip(seconds, over, strict=True)])
    return {"ratio": quartiles(seconds)[1] / quartiles(over)[1], "spread": [by_turn[0], by_turn[2]]}


def peak_bytes(call):
    """How far the memory of this process rises while `call` runs, its result included: the median of five. On Linux."""
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
    """What this script prints when it is started anew with `--memory`, or None where memory can't be measured."""
    if args.device != "cpu" or not Path("/proc/self/statm").exists():
        return None
    # TensorFlow's oneDNN keeps the memory that is freed for later, and peaks after the first would not be seen.
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    # Nor those of memory that the C library keeps.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, sys.argv[0], "--backend", args.backend, "--memory", *["--quick"] * args.quick]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def verdict(rows):
    """Print one line a target and return them with `met` filled in."""
    for row in rows:
        row["met"] = row["value"] <= row["target"]
        print(f"{'pass' if row['met'] else 'MISS'}  {row['name']}: {row['value']:.3f} (target <= {row['target']:g})")
    return rows


def command(args, name):
    """What to run to get the same again."""
    words = ["python", f"benchmarks/{name}.py", "--backend", args.backend, "--device", args.device]
    words += ["--dataset", args.dataset] if hasattr(args, "dataset") else []
    return " ".join(words + ["--quick"] * args.quick)


def write(args, name, record, more_packages=()):
    """Write the record with what is needed to run it again, and say where."""
    path = Path(args.out) / f"{name}_{args.backend}_{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"command": command(args, name), "device": args.device_name, "versions": versions(more_packages)}
    path.write_text(json.dumps(head | record, indent=1))
    print(f"Written: {path}", file=sys.stderr)
    return path
