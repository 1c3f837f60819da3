"""The one table of renamed values, keys and import paths.

Old reports and the records of studies are read through it. An old argument value or import path is refused with an
error that names the new one. `CHANGELOG.md` lists all renamed names.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

RENAMED: dict[str, dict[str, str]] = {
    # Values of public arguments.
    "method": {"noise": "consistency"},
    # Names of checks in reports, and in the form "check:NAME" of what broke an example.
    "check": {
        "control": "attack_self_test",
        "twin": "undefended",
        "steps_beat_one": "many_steps_beat_one",
        "budget": "larger_eps",
    },
    # Keys of a report's JSON.
    "report": {"images": "num_examples"},
    "report.checks": {"meaning": "message"},
    # Modules and names that have moved.
    "import": {
        "keras_drsl._arguments": "keras_drsl._validation",
        "keras_drsl._inputs": "keras_drsl.predictions",
        "keras_drsl.one_pass": "keras_drsl.losses.fused",
        "keras_drsl.attacks.Classifier": "keras_drsl.models.Classifier",
        "keras_drsl.attacks.attack": "keras_drsl.attacks.base",
        "keras_drsl.attacks.balls": "keras_drsl.threat",
        "keras_drsl.attacks.classifier": "keras_drsl.models.classifier",
        "keras_drsl.attacks.gradient": "keras_drsl.attacks.gradients",
        "keras_drsl.evaluation.datasets": "keras_drsl.datasets",
        "keras_drsl.evaluation.examples": "keras_drsl._data",
        "keras_drsl.evaluation.files": "keras_drsl._files",
        "keras_drsl.evaluation.find_logits": "keras_drsl.models.find_logits",
        "keras_drsl.evaluation.head": "keras_drsl.models.logits",
        "keras_drsl.training.divergence": "keras_drsl.training.kl_divergence",
        "keras_drsl.training.lead_penalty": "keras_drsl.training.consistency_penalty",
        **{
            f"keras_drsl.training.{name}": "keras_drsl.training.AttackedBatch"
            for name in ("CLEAN", "ADVERSARIAL", "RIGHT", "RISE")
        },
    },
}


def new_name(kind: str, name: str) -> str:
    """Return the present name of a thing, which may be the name it has always had."""
    return RENAMED[kind].get(name, name)


def refuse_old_value(argument: str, value: Any) -> None:
    """Raise `ValueError` for a value that an argument took under another name."""
    new = RENAMED[argument].get(value) if isinstance(value, str) else None
    if new is not None:
        raise ValueError(f"`{argument}={value!r}` was renamed to {new!r}. Received: {argument}={value!r}")


class _MovedImports:
    """Name the new place of a module or name that has moved.

    Python asks the finders of `sys.meta_path` in turn, and this one last: only for what is not found elsewhere.
    """

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = RENAMED["import"].get(fullname)
        if new is not None:
            raise ImportError(f"`{fullname}` was moved to `{new}`.", name=fullname)
        return None


def refuse_old_imports() -> None:
    """Make imports from an old path fail with an error that names the new one."""
    if _MovedImports not in sys.meta_path:
        sys.meta_path.append(_MovedImports)
