"""The protocol: which attacks and checks run on which examples, and when an example counts as broken."""

import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_drsl import _validation
from keras_drsl._data import Examples, digest, read_labels
from keras_drsl._progress import Progress
from keras_drsl._typing import Array
from keras_drsl.attacks import Pool
from keras_drsl.evaluation.checks import CHECKS, applies, choose, run_check
from keras_drsl.evaluation.context import MAX_EXAMPLES, Audit, EvaluationContext
from keras_drsl.evaluation.kept import HeldArrays, KeptFile, Store, finish, is_unfinished, score, try_again
from keras_drsl.evaluation.reading import Reader
from keras_drsl.evaluation.report import RobustnessReport
from keras_drsl.evaluation.report_format import COST
from keras_drsl.evaluation.results import CLEAN, LEFT_OUT, Check, in_report
from keras_drsl.evaluation.state import State
from keras_drsl.evaluation.stopping import BETWEEN_LOOKS, StoppingRule
from keras_drsl.evaluation.suites import check_suite, make_attacks
from keras_drsl.evaluation.workers import Job, Recipe, Workers, open_workers
from keras_drsl.models.classifier import count_wrong, is_misclassified, num_predictions
from keras_drsl.models.fingerprint import fingerprint, provenance
from keras_drsl.models.heads import View
from keras_drsl.models.logits import NUM_TRIED, LogitsModel, find_logits_of
from keras_drsl.models.state import check_model, owner
from keras_drsl.threat import ThreatModel

CHECK_WORK = {"before": 1, "after": 100}  # rough numbers of evaluations of the model per example, for progress


class Evaluator:
    """An evaluation whose arguments are checked, ready for models and examples.

    `evaluate_robustness`, `robustness_curve` and `RobustnessMonitor` share it, and explain its arguments.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        threat: ThreatModel,
        *,
        suite: str,
        attacks: Iterable[Any] | None = None,
        checks: str | Iterable[Any] | None = None,
        seed: int = 0,
        batch_size: int = 256,
        max_samples: int | None = None,
        shard: tuple[int, int] | None = None,
        view: View | None = None,
        stopping: StoppingRule | None = None,
    ) -> None:
        self.threat = threat
        self.stopping = stopping
        self.view = (view or View()).check()
        self.reader = Reader(threat, self.view)
        suite = check_suite(suite)
        attack_seed = _validation.check_integer("seed", seed, at_least=0)
        by_name = make_attacks(suite, attacks, threat, attack_seed, of_positions=self.view.task == "positions")
        # Attacks without gradients come last: the images that they break withstood the others.
        self.attacks = dict(sorted(by_name.items(), key=lambda item: not item[1].needs_gradient))
        self.checks, self._listed = choose(checks, suite)
        part = _validation.check_shard(shard)
        self.settings: dict[str, Any] = {
            **threat.to_dict(),
            "suite": suite if attacks is None else "custom",
            "checks": self.checks if self._listed else checks or suite,
            "seed": attack_seed,
            "batch_size": _validation.check_integer("batch_size", batch_size, at_least=1),
            "max_samples": _validation.check_max_samples(max_samples),
            "shard": part and list(part),
        } | self.view.settings
        if stopping is not None:
            self.settings |= stopping.settings

    def check_examples(self, examples: Examples) -> Examples:
        """Return examples that fit the threat model, or raise `ValueError`."""
        self.reader.check_inputs("x_or_dataset", examples.whole[0], examples.layout)
        return examples

    def read_examples(self, model: keras.Model | None, x: Any, y: Any) -> Examples:
        """Return the examples of arrays, a data set or a folder of images, or raise `ValueError`."""
        return self.reader.read(model, x, y, **{name: self.settings[name] for name in ("max_samples", "shard")})

    def read_labels(self, examples: Examples, logits: Array) -> Array:
        """Return the labels of examples as class ids, -1 for positions that do not count.

        Args:
            examples: The examples.
            logits: The logits of all of them, shape `(count, C)` or `(count, positions, C)`.

        Raises:
            ValueError: If the labels do not fit the logits.
        """
        names = examples.class_names
        if names is not None and len(names) > logits.shape[-1]:
            raise ValueError(
                f"`model` must have an output for each of the {len(names)} sub-folders: {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}. Received: a model of {logits.shape[-1]} classes"
            )
        return read_labels(examples.y, logits, self.view.ignore_class)

    def find_logits(self, model: keras.Model, examples: Examples, from_logits: bool | None = None) -> LogitsModel:
        """Find the logits of a model."""
        return find_logits_of(model, examples.x[:NUM_TRIED], from_logits, self.reader.view_of(examples))

    def find_undefended(self, undefended: Any, model: LogitsModel, examples: Examples) -> LogitsModel:
        """Find the logits of an undefended model, or raise `ValueError` if it does not fit the other model."""
        check_model("undefended", undefended)
        x = examples.x[:NUM_TRIED]
        view = self.reader.view_of(examples)
        if view.embedding is not None:
            raise ValueError("`undefended` must be left out where embeddings are attacked: it has others")
        try:
            second = find_logits_of(undefended, x, None, view.replace(output=None, preprocessing=None))
            shapes = [some.classifier.logits(x[:1]).shape for some in (second, model)]
        except Exception as error:
            raise ValueError(f"`undefended` must be a classifier of the same inputs as `model`: {error}") from error
        if shapes[0][-1] != shapes[1][-1]:
            raise ValueError(
                f"`undefended` must have the {shapes[1][-1]} classes of `model`. Received: {shapes[0][-1]}"
            )
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`undefended` must have the {shapes[1][1]} positions of `model`. Received: {shapes[0][1]}"
            )
        return second

    def make_pool(self, model: LogitsModel, examples: Examples, x_pool: Any = None) -> Pool | None:
        """Return the images that searches may start from, or None if no attack uses them, as for a model of positions.

        Args:
            model: The model and its logits.
            examples: The examples; their whole data set is the pool.
            x_pool: Another pool, as `evaluate_robustness` takes it, or None.

        Raises:
            ValueError: If the pool does not fit the examples.
        """
        model.seed(self.settings["seed"], "pool")
        if self.view.task == "positions":
            return None
        given = None if x_pool is None else self.reader.read_pool(x_pool, examples)
        if not any(attack.uses_pool for attack in self.attacks.values()):
            return None
        x, y = self.reader.whole_pool(examples) if given is None else given
        return Pool(model.classifier, x, y, batch_size=self.settings["batch_size"], layout=examples.layout)

    def evaluate(
        self,
        model: LogitsModel,
        examples: Examples,
        *,
        pool: Pool | None = None,
        undefended: LogitsModel | None = None,
        state_path: str | os.PathLike[str] | None = None,
        keep_examples: bool | Path = False,
        workers: tuple[str, int] | None = None,
        from_logits: bool | None = None,
        verbose: int = 0,
        title: str = "",
    ) -> RobustnessReport:
        """Run attacks and checks, and return the report.

        Args:
            model: The model and its logits.
            examples: The examples, checked.
            pool: The images that searches may start from, or None.
            undefended: The undefended model and its logits, or None.
            state_path: A file to keep progress in, or None.
            keep_examples: Whether to keep the perturbed inputs, or the file to keep them in.
            workers: What attacks the examples, as `check_workers` returns it; None for this process.
            from_logits: What `find_logits` was told, for other processes.
            verbose: 0 for no output, 1 to show progress.
            title: What the progress begins with.

        Raises:
            ValueError: If labels do not match, outputs are not finite, or the state belongs to another evaluation.
        """
        if workers is not None and self.reader.view_of(examples).embedding is not None:
            raise ValueError("`workers` must be None where embeddings are attacked. Received: workers")
        batch_size = self.settings["batch_size"]
        model.seed(self.settings["seed"], "clean")
        logits = model.classifier.logits_in_batches(examples.x, batch_size)
        outputs = logits if model.outputs == "logits" else model.model.logits_in_batches(examples.x, batch_size)
        # Of a model of positions, no image is tried again with its values rounded.
        are_8bit = examples.are_8bit and logits.ndim == 2
        examples = examples._replace(y=self.read_labels(examples, logits), are_8bit=are_8bit)
        if not (np.isfinite(logits).all() and np.isfinite(outputs).all()):
            raise ValueError("`model` must return finite outputs for all inputs. Received: NaN or infinite ones")
        settings = self.settings | {"outputs": model.outputs}
        if self.stopping is not None:
            self.stopping.check_count(len(examples.x))
            settings["num_given"] = len(examples.x)
        provenance = _provenance(model, undefended, examples, pool)
        identity = self._identity(settings, provenance, outputs)
        if keep_examples:
            identity["keep_examples"] = True  # a state without this key has no examples
        state = State(state_path, identity, len(examples.x))
        threat = self.threat if examples.layout is None else examples.layout.extend(self.threat)
        wrong = is_misclassified(outputs, examples.y)
        state.broken_by = [
            CLEAN if is_wrong and name != LEFT_OUT else name
            for is_wrong, name in zip(wrong, state.broken_by, strict=True)
        ]
        state.broken_rounded = [bool(pair[0]) or pair[1] for pair in zip(wrong, state.broken_rounded, strict=True)]
        if outputs.ndim == 3:
            state.wrong = {CLEAN: count_wrong(outputs, examples.y).tolist()} | state.wrong
        context = EvaluationContext(
            model=model,
            x=examples.x,
            y=examples.y,
            ids=examples.ids,
            logits=logits,
            broken_by=tuple(state.broken_by),
            threat=threat,
            seed=settings["seed"],
            batch_size=batch_size,
            attacks={name: attack.with_threat(threat) for name, attack in self.attacks.items()},
            undefended=undefended,
            audit=Audit(**state.audit),
            class_names=examples.class_names,
            are_8bit=examples.are_8bit,
            is_partly_fixed=self.threat.mask is not None
            or (examples.layout is not None and examples.layout.has_fixed_inputs),
        )
        store = None
        if keep_examples:
            path = keep_examples if isinstance(keep_examples, Path) else None
            digested = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
            if path is not None and state.done and (earlier := _read_again(path, state, settings, provenance)):
                return earlier
            store = Store(path, examples.x, digested, resumes=bool(state.done))
        names = [name for name in self.checks if self._listed or applies(name, context)]
        job = Job(model, context.attacks, pool, threat, examples.x, examples.y, context.seed, batch_size)

        def make_recipe() -> Recipe:
            return Recipe.of(owner(model.model), from_logits, self.reader.view_of(examples), job)

        try:
            with (
                Progress(enabled=bool(verbose)) as progress,
                open_workers(workers, job, make_recipe) as opened,
            ):
                run = _Run(context, state, opened, pool, names, progress, title, examples.num_labels, store)
                run.run_all(self.stopping)
            report = self._report(settings, names, state, examples, provenance, outputs.argmax(axis=-1))
            kept = None
            if store is not None:
                kept = finish(context, store, state.broken_by, examples)
                if LEFT_OUT in state.broken_by:
                    attacked = np.array(state.broken_by) != LEFT_OUT
                    kept = {name: values[attacked] for name, values in kept.items()}
                report.checks.append(try_again(context, store, state.broken_by))
        except BaseException:
            if store is not None:
                store.close(delete=state_path is None)
            raise
        if store is not None and kept is not None:
            self._keep_examples(report, kept, store)
        return report

    def _keep_examples(self, report: RobustnessReport, kept: dict[str, Array], store: Store) -> None:
        """Add the kept examples to a report, and write both to the file of the store, if it has one."""
        report.kept = kept
        if store.path is None:
            return
        try:
            report.to_npz(store.path)
            report.kept = KeptFile(store.path)
            store.close(delete=True)
        except (OSError, ValueError) as error:
            report.kept = HeldArrays(kept, store)  # no other evaluation may take the file
            warnings.warn(
                f"The examples could not be written, and stay in {str(store.partial)!r} until the report, which has "
                f"them too, is written by `report.to_npz`: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _identity(self, settings: dict[str, Any], provenance: dict[str, Any], outputs: Array) -> dict[str, Any]:
        """Return what must be equal for an evaluation to continue from a state."""
        return {
            "settings": settings,
            **{key: provenance[key] for key in ("model", "undefended", "data", "pool", "backend")},
            "predictions": digest(outputs.argmax(axis=-1)),
            "attacks": {name: attack.settings for name, attack in self.attacks.items()},
            "version": provenance["versions"]["keras-drsl"],
        }

    def _report(
        self,
        settings: dict[str, Any],
        check_names: list[str],
        state: State,
        examples: Examples,
        provenance: dict[str, Any],
        predictions: Array,
    ) -> RobustnessReport:
        records = [
            {"name": name, "settings": attack.settings} | {key: getattr(state, key)[name] for key in ("seconds", *COST)}
            for name, attack in self.attacks.items()
        ]
        for name in (f"check:{name}" for name in check_names):
            if name in state.broken_by:
                # A check attacks a limited number of images: it was not tried on all that were robust.
                records.append(
                    {"name": name, "settings": {}, "seconds": state.seconds[name], "tried": state.done[name]}
                )
        per_example: dict[str, list[Any]] = {"index": examples.ids.tolist(), "broken_by": list(state.broken_by)}
        if state.wrong:
            # After each attack; what checks found is in the last number.
            columns = [state.wrong[name] for name in (CLEAN, *self.attacks, "checks")]
            per_example["wrong"] = [list(counts) for counts in zip(*columns, strict=True)]
            per_example["positions"] = num_predictions(examples.y).tolist()
            records = records[: len(self.attacks)]
        else:
            per_example["label"] = examples.y.tolist()
        if examples.num_labels > 1:
            per_example = _join_labels(per_example, examples.num_labels, [str(record["name"]) for record in records])
        if examples.are_8bit:
            per_example["broken_rounded"] = examples.any_label(np.array(state.broken_rounded)).tolist()
        if examples.files is not None:
            per_example |= {"file": examples.files.tolist(), "prediction": predictions.tolist()}
            provenance = provenance | {"classes": examples.class_names}
        if LEFT_OUT in state.broken_by:
            attacked = [by != LEFT_OUT for by in state.broken_by]
            per_example = {name: list(compress(column, attacked)) for name, column in per_example.items()}
        checks = [Check(**state.checks[name]) for name in check_names]
        return RobustnessReport(settings, records, checks, per_example, provenance)


class _Run:
    """Attacks and checks at work on the examples of one evaluation, from where its state says."""

    def __init__(
        self,
        context: EvaluationContext,
        state: State,
        workers: Workers,
        pool: Pool | None,
        checks: list[str],
        progress: Progress,
        title: str,
        num_labels: int,
        store: Store | None,
    ) -> None:
        self._num_labels = num_labels
        self._store = store
        self._checks = checks
        self._context = context
        self._numbers = context.num_predictions
        self._state = state
        self._workers = workers
        self._progress = progress
        self._title = title
        # The work that is left, in evaluations of the model per robust example.
        self._todo = {f"check:{name}": float(CHECK_WORK[CHECKS[name].stage]) for name in checks}
        num_classes = context.logits.shape[-1]
        for name, attack in context.attacks.items():
            runs = attack.num_runs(num_classes) + (0 if pool is None else attack.num_pool_runs(num_classes))
            self._todo[name] = float(runs * attack.num_evaluations)
        self._finished = 0.0

    def run_all(self, stopping: StoppingRule | None) -> None:
        """Run the checks of before, the attacks, and the checks of after.

        Args:
            stopping: When the attacks may end before all examples are attacked, or None.
        """
        before, after = (
            [name for name in self._checks if CHECKS[name].stage == stage] for stage in ("before", "after")
        )
        self.begin("checks_before")
        self.run_checks(before)
        if stopping is not None:
            self.run_parts(stopping)
        else:
            for name in self._context.attacks:
                self.begin(name)
                self.run_attack(name)
        self.begin("checks")
        self.run_checks(after)

    def begin(self, stage: str) -> None:
        """Count the wrong positions of a model of positions from here on under a stage: an attack, or the checks."""
        wrong = self._state.wrong
        if wrong:
            wrong.setdefault(stage, list(list(wrong.values())[-1]))

    def run_attack(self, name: str) -> None:
        """Attack the examples that are robust so far, batch by batch."""
        size = self._context.batch_size
        robust = self._robust_before(name, np.arange(len(self._state.broken_by)))
        batches = [(number, robust[start : start + size]) for number, start in enumerate(range(0, len(robust), size))]
        done = self._state.done.get(name, 0)
        self._show(name, min(done * size, len(robust)), len(robust))
        for number in self._attack(name, batches[done:]):
            self._show(name, min((number + 1) * size, len(robust)), len(robust))
        self._finish(name, len(robust))

    def run_parts(self, stopping: StoppingRule) -> None:
        """Run all attacks on a few examples at a time, in a random order, until the rule is met."""
        state, count, num_robust = self._state, 0, 0
        parts = stopping.parts(len(state.broken_by), self._context.seed)
        # What checks break afterwards does not move the end, also where the evaluation is repeated.
        robust_names = {None, *(f"check:{name}" for name in self._checks if CHECKS[name].stage == "after")}
        size = self._context.batch_size
        per_part = -(-BETWEEN_LOOKS // size)
        for number, part in enumerate(parts):
            for name in self._context.attacks:
                robust = self._robust_before(name, part)
                batches = [(number * per_part + i, robust[i * size : (i + 1) * size]) for i in range(per_part)]
                done = state.done.get(name, 0)
                # Without batches too, so that each attack is counted.
                list(self._attack(name, [batch for batch in batches if batch[0] >= done and len(batch[1])]))
            count += len(part)
            num_robust += sum(state.broken_by[row] in robust_names for row in part)
            self._progress.update(
                f"{self._title}{count} of at most {len(state.broken_by)} images, "
                f"{num_robust / count:.1%} of them robust",
                done=count,
                total=len(state.broken_by),
            )
            if stopping.is_met(num_robust, count):
                break
        for part in parts[number + 1 :]:
            for row in part:
                state.broken_by[row] = LEFT_OUT
        state.save()
        for name in self._context.attacks:
            self._finish(name, 0)

    def _robust_before(self, name: str, rows: Array) -> Array:
        """Return which of some examples were robust when an attack began, also if it began before a kill."""
        return np.array([row for row in rows if self._state.broken_by[row] in (None, name)], dtype=int)

    def _attack(self, name: str, batches: list[tuple[int, Array]]) -> Iterator[int]:
        """Attack batches of examples, record what is found, and yield the number of each batch when it is done."""
        context, state = self._context, self._state
        state.done.setdefault(name, 0)
        for key in ("seconds", *COST):
            getattr(state, key).setdefault(name, 0.0 if key.endswith("seconds") else 0)
        for (number, rows), found in zip(batches, self._workers.run(name, batches), strict=True):
            x, y = context.x[rows], context.y[rows]
            self._record(name, rows, found.wrong)
            broken = found.wrong.astype(bool)
            if context.are_8bit and broken.any():
                rounded = context.threat.round_to_integers(found.x_adv[broken], x[broken])
                wrong = context.model.misclassifies(rounded, y[broken], len(rounded))
                for index in rows[broken][wrong]:
                    state.broken_rounded[index] = True
            self._keep(rows, found.x_adv, found.wrong)
            state.audit = Audit(**state.audit).add(found.audit)._asdict()
            state.done[name] = number + 1
            for key in ("seconds", *COST):
                getattr(state, key)[name] += getattr(found, key)
            state.save()
            yield number

    def _keep(self, rows: Array, x_adv: Array, found: Array) -> None:
        """Keep the points of an attack or check, if the evaluation keeps examples, before the state counts them."""
        if self._store is not None:
            is_broken = found == self._numbers[rows]
            self._store.update(rows, x_adv, score(self._context, x_adv, rows, is_broken))
            self._store.flush()

    def _record(self, name: str, rows: Array, found: Array) -> None:
        """Record which examples an attack or check has broken, or how many of their positions.

        Args:
            name: What broke them.
            rows: The positions of the examples.
            found: How many predictions of each are wrong.
        """
        state, numbers = self._state, self._numbers[rows]
        if state.wrong:
            worst = list(state.wrong.values())[-1]
            for row, count in zip(rows.tolist(), found.tolist(), strict=True):
                worst[row] = max(worst[row], count)
            found = np.array([worst[row] for row in rows], int)
        for row in rows[found == numbers]:
            state.broken_by[row] = state.broken_by[row] or name

    def run_checks(self, names: list[str]) -> None:
        """Run the checks that the state does not hold yet."""
        state = self._state
        for name in names:
            count = min(state.broken_by.count(None), MAX_EXAMPLES)
            self._show(f"check:{name}", 0, count)
            if name not in state.checks:
                began = time.perf_counter()
                context, ids = self._present_context(), self._context.ids
                context.model.seed(context.seed, name)
                outcome = run_check(name, context)
                key = f"check:{name}"
                rows = np.flatnonzero(np.isin(ids, list(outcome.broken)))
                found = np.array([outcome.wrong.get(int(number), 1) for number in ids[rows]], int)
                self._record(key, rows, found)
                with_point = np.array([int(number) in outcome.x_adv for number in ids[rows]], bool)
                if with_point.any():
                    points = np.stack([outcome.x_adv[int(number)] for number in ids[rows[with_point]]])
                    self._keep(rows[with_point], points, found[with_point])
                state.checks[name] = {
                    "name": name,
                    "status": outcome.status,
                    "value": outcome.value,
                    "message": outcome.message,
                }
                state.done[key], state.seconds[key] = self._num_robust(context), time.perf_counter() - began
                state.save()
            self._finish(f"check:{name}", count)

    def _present_context(self) -> EvaluationContext:
        """Return the context of a check: what is known now, of the examples that an early end did not leave out."""
        state = self._state
        context = dataclasses.replace(
            self._context,
            broken_by=tuple(state.broken_by),
            audit=Audit(**state.audit),
            wrong={key: np.array(counts) for key, counts in state.wrong.items()},
        )
        if LEFT_OUT not in state.broken_by:
            return context
        rows = np.flatnonzero(np.array(state.broken_by) != LEFT_OUT)
        arrays = {name: getattr(context, name)[rows] for name in ("x", "y", "ids", "logits")}
        return dataclasses.replace(context, broken_by=tuple(in_report(state.broken_by)), **arrays)

    def _num_robust(self, context: EvaluationContext) -> int:
        """Return how many examples a check attacks, of those whose labels are all robust so far."""
        ids, labels = context.robust.ids, self._num_labels
        robust = np.array([name is None for name in context.broken_by]).reshape(-1, labels).all(axis=1)
        return len(np.intersect1d(ids // labels, (context.ids[::labels] // labels)[robust]))

    def _show(self, name: str, done: int, count: int) -> None:
        """Show which attack or check is at work, after `done` of its `count` examples."""
        robust = self._state.broken_by.count(None)
        later = robust * sum(work for other, work in self._todo.items() if other != name)
        finished = self._finished + done * self._todo[name]
        self._progress.update(
            f"{self._title}{name.replace(':', ' ')}: {done} of {count} images, "
            f"{robust / len(self._state.broken_by):.1%} robust so far",
            done=finished,
            total=self._finished + count * self._todo[name] + later,
        )

    def _finish(self, name: str, count: int) -> None:
        self._finished += count * self._todo.pop(name)


def _read_again(
    path: Path, state: State, settings: dict[str, Any], provenance: dict[str, Any]
) -> RobustnessReport | None:
    """Return the report of an evaluation that has ended, from the file of its kept examples, or None.

    Args:
        path: The file.
        state: The state that the evaluation left.
        settings: The settings of the report.
        provenance: Its provenance.
    """
    if not path.exists() or is_unfinished(path):
        return None
    try:
        report = RobustnessReport.from_npz(path)
    except ValueError:
        return None
    facts = ("model", "undefended", "data", "pool", "backend")
    expected = settings, {name: provenance[name] for name in facts}
    found = report.settings, {name: report.provenance.get(name) for name in facts}
    is_same = json.loads(json.dumps(expected)) == json.loads(json.dumps(found))
    return report if is_same and report.broken_by_row == in_report(state.broken_by) else None


def _join_labels(per_row: dict[str, list[Any]], num_labels: int, names: list[str]) -> dict[str, list[Any]]:
    """Return the verdict on each example of the verdicts on its labels.

    What broke an example is what broke the first of its labels.
    """
    rank = {name: position for position, name in enumerate([CLEAN, *names])}
    starts = range(0, len(per_row["index"]), num_labels)
    by_label = [per_row["broken_by"][start : start + num_labels] for start in starts]
    return {
        "index": [per_row["index"][start] // num_labels for start in starts],
        "label": [per_row["label"][start : start + num_labels] for start in starts],
        "broken_by": [min((name for name in row if name), key=rank.__getitem__, default=None) for row in by_label],
        "broken_by_label": by_label,
    }


def _provenance(
    model: LogitsModel, undefended: LogitsModel | None, examples: Examples, pool: Pool | None
) -> dict[str, Any]:
    """Return model, data, versions and device, for a reader who wants to repeat the evaluation."""
    pool_facts = None
    if pool is not None:
        pool_facts = {"digest": pool.digest, "num_images": pool.num_images, "empty_classes": pool.empty_classes}
    return {
        "undefended": None if undefended is None else fingerprint(owner(undefended.model)),
        "pool": pool_facts,
    } | provenance(owner(model.model), examples.digest)
