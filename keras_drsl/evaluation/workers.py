"""Batches of examples that are attacked in this process, in several processes, or on a cluster of Ray."""

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from keras_drsl import _backend, _escape
from keras_drsl._typing import Array
from keras_drsl.attacks import Attack, Pool
from keras_drsl.evaluation.context import Audit, breaks
from keras_drsl.models.calls import count_calls
from keras_drsl.models.heads import View
from keras_drsl.models.logits import NUM_TRIED, LogitsModel, find_logits_of
from keras_drsl.models.state import preserve_state
from keras_drsl.threat import ThreatModel

CONFIG = ("floatx", "epsilon", "image_data_format")  # what a worker takes over of Keras's configuration
MAX_LOSSES = 3  # how often workers may die before one more batch is done


class Found(NamedTuple):
    """Hold what an attack found on a batch.

    Attributes:
        x_adv: The points, of the shape of the inputs.
        wrong: How many predictions of each are wrong, shape `(batch,)`.
        audit: A record of the perturbations.
        gradients: On how many inputs the model was evaluated with a gradient.
        queries: On how many without one.
        compile_seconds: The time that programs were compiled.
        seconds: The time that it took, compilation included.
    """

    x_adv: Array
    wrong: Array
    audit: Audit
    gradients: int
    queries: int
    compile_seconds: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Job:
    """Hold a model, examples and attacks in the process that runs them.

    Attributes:
        model: The model and its logits.
        attacks: The attacks, by name.
        pool: The images that searches may start from, or None.
        threat: The threat model.
        x: Inputs, shape `(count, ...)`.
        y: Class ids, shape `(count,)` or `(count, positions)`.
        seed: The seed of the evaluation.
        batch_size: How many examples are attacked together.
    """

    model: LogitsModel
    attacks: Mapping[str, Attack]
    pool: Pool | None
    threat: ThreatModel
    x: Array
    y: Array
    seed: int
    batch_size: int

    def run(self, name: str, number: int, rows: Array) -> Found:
        """Attack some examples.

        Args:
            name: The name of the attack.
            number: The number of the batch, which the random numbers of a random model depend on.
            rows: The positions of the examples.
        """
        began = time.perf_counter()
        x, y = self.x[rows], self.y[rows]
        with preserve_state(self.model.classifier, inputs=x), count_calls() as calls:
            self.model.seed(self.seed, name, number)
            x_adv = self.attacks[name](self.model.classifier, x, y, batch_size=self.batch_size, pool=self.pool)
            cost = dataclasses.asdict(calls)
            wrong, audit = breaks(self.model, x_adv, x, y, self.threat)
        return Found(x_adv, wrong, audit, **cost, seconds=time.perf_counter() - began)

    def first_outputs(self) -> Array:
        """Return what the model returns for the first inputs, by which processes tell whether theirs is the same."""
        with preserve_state(self.model.classifier, inputs=self.x):
            self.model.seed(self.seed, "workers")
            return self.model.model.logits(self.x[:NUM_TRIED])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hold what another process makes a `Job` of: the model as Keras saves it, and arrays.

    Attributes:
        model: The model and the view of it, pickled.
        classes: The classes of its own layers by their names in a saved model, pickled.
        from_logits: As in `evaluate_robustness`.
        backend: The backend of Keras.
        config: The names and values of Keras's configuration.
        outputs: What the model returns for the first inputs.
        rest: The attributes of the job, except for the model.
    """

    model: bytes
    classes: bytes
    from_logits: bool | None
    backend: str
    config: dict[str, Any]
    outputs: Array
    rest: dict[str, Any]

    @classmethod
    def of(cls, model: keras.Model, from_logits: bool | None, view: View, job: Job) -> "Recipe":
        """Return what other processes make a job of.

        Raises:
            ValueError: If the model cannot be saved.
        """
        import cloudpickle

        config = {name: getattr(keras.config, name)() for name in CONFIG}
        try:
            saved, classes = cloudpickle.dumps((model, view)), cloudpickle.dumps(_own_classes(model, view))
        except Exception as error:
            raise _cannot_be_sent(error) from error
        rest = {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name != "model"}
        return cls(saved, classes, from_logits, _backend.NAME, config, job.first_outputs(), rest)

    def make(self) -> Job:
        """Return the job in this process, or raise `ValueError` if its model is another one here."""
        import cloudpickle

        if self.backend != _backend.NAME:
            raise ValueError(
                f"`workers` must have the backend {self.backend} of this process: set the environment variable "
                f"KERAS_BACKEND. Received: {_backend.NAME}"
            )
        for name, value in self.config.items():
            getattr(keras.config, f"set_{name}")(value)
        try:
            with keras.saving.custom_object_scope(cloudpickle.loads(self.classes)):
                model, view = cloudpickle.loads(self.model)
        except Exception as error:
            raise _cannot_be_sent(error) from error
        job = Job(find_logits_of(model, self.rest["x"][:NUM_TRIED], self.from_logits, view), **self.rest)
        found, scale = job.first_outputs(), float(np.abs(self.outputs).max())
        if found.shape != self.outputs.shape or not np.allclose(found, self.outputs, rtol=1e-2, atol=1e-3 * scale):
            raise _cannot_be_sent("it returns other outputs after it was loaded")
        return job


def _own_classes(model: Any, view: View) -> dict[str, type]:
    """Return the classes of layers that are not Keras's, which another process may not know."""
    owners = [some for some in (model, view.preprocessing) if isinstance(some, keras.Layer)]
    classes = {type(layer) for some in owners for layer in some._flatten_layers()}
    own = [cls for cls in classes if cls.__module__.partition(".")[0] != "keras"]
    return {name: cls for cls in own for name in (cls.__name__, keras.saving.get_registered_name(cls))}


Batches = Sequence[tuple[int, Array]]


class Workers(Protocol):
    """What attacks batches of examples."""

    def run(self, name: str, batches: Batches) -> Iterator[Found]:
        """Attack batches, and give what was found in their order.

        Args:
            name: The name of the attack.
            batches: The number of each batch, and the positions of its examples.
        """


class Here:
    """Attack batches in this process, one after the other."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def run(self, name: str, batches: Batches) -> Iterator[Found]:
        """Attack batches, and give what was found in their order."""
        for number, rows in batches:
            yield self._job.run(name, number, rows)


def check_workers(workers: Any) -> tuple[str, int] | None:
    """Return the kind and number of workers, or raise `ValueError`.

    Args:
        workers: None, `"processes:N"` or `"ray"`.

    Returns:
        None for this process; `("processes", N)` or `("ray", 0)`.

    Raises:
        ImportError: Without joblib, or Ray.
    """
    if workers is None:
        return None
    match = re.fullmatch(r"processes:([1-9]\d*)|ray", workers) if isinstance(workers, str) else None
    if match is None:
        raise ValueError(f'`workers` must be "processes:N", "ray" or None. Received: workers={workers!r}')
    kind, package = ("ray", "ray") if workers == "ray" else ("processes", "joblib")
    try:
        for module in (package, "cloudpickle"):
            importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"`workers={workers!r}` needs `pip install {package} cloudpickle`") from error
    return kind, int(match[1] or 0)


@contextlib.contextmanager
def open_workers(workers: tuple[str, int] | None, job: Job, make_recipe: Callable[[], Recipe]) -> Iterator[Workers]:
    """Give workers for a job, and stop them at the end.

    Args:
        workers: What `check_workers` returned.
        job: The job in this process.
        make_recipe: Returns what other processes make it of.

    Raises:
        ValueError: If the model cannot be sent to other processes.
    """
    if workers is None:
        yield Here(job)
        return
    kind, count = workers
    with _Ray() if kind == "ray" else _Processes(count) as started:
        started.send(make_recipe())
        yield started


class _Elsewhere:
    """Attack batches in other processes, and again those of workers that died."""

    def run(self, name: str, batches: Batches) -> Iterator[Found]:
        """Attack batches, and give what was found in their order."""
        left, losses = list(batches), 0
        while left:
            try:
                for found in self._run(name, left):
                    left, losses = left[1:], 0
                    yield found
            except self._lost as error:
                losses += 1
                if losses > MAX_LOSSES:
                    raise RuntimeError(
                        f"`workers` died {losses} times before one more batch of {name} was done, perhaps for lack of "
                        "memory. With `state_path`, the same call continues"
                    ) from error
                self._restart()

    _lost: tuple[type[Exception], ...] = ()

    def _run(self, name: str, batches: Batches) -> Iterator[Found]:
        raise NotImplementedError

    def _restart(self) -> None:
        """Replace workers that died."""


def _in_windows(
    submit: Callable[[int, Array], Any],
    batches: Batches,
    size: int,
    cancel: Callable[[Any], Any] = lambda task: task.cancel(),
) -> Iterator[Any]:
    """Submit tasks, at most so many that are not done, and give them in their order. Cancel the rest at an error."""
    running: deque[Any] = deque()
    try:
        for batch in batches:
            running.append(submit(*batch))
            if len(running) >= size:
                yield running.popleft()
        while running:
            yield running.popleft()
    finally:
        for task in running:
            cancel(task)


class _Processes(_Elsewhere):
    """Attack batches in processes of this machine, by loky, which joblib contains."""

    def __init__(self, count: int) -> None:
        from joblib.externals.loky.process_executor import BrokenProcessPool

        self._lost = (BrokenProcessPool,)
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="keras-drsl-"))
        self._path = self._folder / "recipe"
        self._executor: Any = None
        self._restart()

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, kill_workers=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, recipe: Recipe) -> None:
        """Write the recipe to a file that each worker reads once."""
        import cloudpickle

        self._path.write_bytes(cloudpickle.dumps(recipe))

    def _run(self, name: str, batches: Batches) -> Iterator[Found]:
        submit = partial(self._executor.submit, _run_of_file, str(self._path), name)
        for future in _in_windows(submit, batches, 2 * self._count):
            yield future.result()

    def _restart(self) -> None:
        """Replace workers that died."""
        from joblib.externals.loky import ProcessPoolExecutor

        # Threads of several processes would wait for each other.
        threads = str(max(1, (os.cpu_count() or 1) // self._count))
        environment = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"), threads) | {
            name: value for name, value in os.environ.items() if name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
        }
        self._executor = ProcessPoolExecutor(self._count, env=environment | {"KERAS_BACKEND": _backend.NAME})


_JOBS: dict[str, Job] = {}  # of this process, if it is a worker


def _job(key: str, read: Callable[[], Recipe]) -> Job:
    """Return the job of a worker, made once."""
    if key not in _JOBS:
        _JOBS.clear()
        _JOBS[key] = read().make()
    return _JOBS[key]


def _cannot_be_sent(reason: Exception | str) -> ValueError:
    shown = reason if isinstance(reason, str) else _escape.error_line(reason)
    return ValueError(f"`model` must be one that Keras can save and load, to be sent to `workers`. Received: {shown}")


def _run_of_file(path: str, name: str, number: int, rows: Array) -> Found:
    """Attack a batch in a worker."""

    def read() -> Recipe:
        import cloudpickle

        recipe: Recipe = cloudpickle.loads(Path(path).read_bytes())
        return recipe

    return _job(path, read).run(name, number, rows)


class _Ray(_Elsewhere):
    """Attack batches as tasks of Ray: on the cluster that is connected, or one of this machine."""

    def __init__(self) -> None:
        import ray

        self._lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
        self._started = not ray.is_initialized()
        if self._started:
            # `RAY_ADDRESS` in the environment names a cluster.
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
        self._recipe: Any = None

    def __enter__(self) -> "_Ray":
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def send(self, recipe: Recipe) -> None:
        """Put the recipe where each worker reads it once."""
        import ray

        self._recipe = ray.put(recipe)

    def _run(self, name: str, batches: Batches) -> Iterator[Found]:
        import ray

        # A worker that dies is told of, and its batch is submitted again by `run`.
        task = ray.remote(max_retries=0)(_run_of_object)
        task = task.options(runtime_env={"env_vars": {"KERAS_BACKEND": _backend.NAME}})
        submit = partial(task.remote, [self._recipe], self._recipe.hex(), name)
        count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        for result in _in_windows(submit, batches, 2 * count, cancel=ray.cancel):
            yield ray.get(result)


def _run_of_object(recipes: list[Any], key: str, name: str, number: int, rows: Array) -> Found:
    """Attack a batch in a worker of Ray.

    Args:
        recipes: The reference of the recipe, in a list so that Ray does not read it for each task.
        key: What tells it from others.
        name: As in `Job.run`.
        number: As in `Job.run`.
        rows: As in `Job.run`.
    """

    def read() -> Recipe:
        import ray

        recipe: Recipe = ray.get(recipes[0])
        return recipe

    return _job(key, read).run(name, number, rows)
