"""Imports point down: no module imports one of a higher layer, or of a layer that it must not know."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "keras_drsl"

# Files that may import one more part than theirs.
MAY_ALSO_IMPORT = {"training/linear_head.py": {"losses"}}

# What each part of the package may import of the others.
MAY_IMPORT = {
    "_typing": set(),
    "_validation": set(),
    "_renamed": set(),
    "_files": {"_escape"},
    "_intervals": {"_typing"},
    "_progress": set(),
    "_schema": set(),
    "_escape": set(),
    "_page": {"_escape"},
    "__main__": set(),
    "_backend": {"_typing"},
    "plotting": {"_files", "_typing"},
    "datasets": {"_escape", "_typing", "_validation"},
    "spread": {"_backend", "_typing"},
    "predictions": {"_backend", "_typing", "_validation", "spread"},
    "_data": {"_backend", "_typing", "_validation"},
    "threat": {"_typing", "_validation"},
    "losses": {"_backend", "_typing", "_validation", "predictions", "spread"},
    "metrics": {"_backend", "_typing", "_validation", "predictions", "spread"},
    "models": {"_backend", "_data", "_typing", "_validation", "predictions", "spread", "threat"},
    "attacks": {"_backend", "_data", "_typing", "_validation", "models", "threat"},
    "certificates": {
        *("_data", "_escape", "_files", "_intervals", "_progress", "_schema", "_typing", "_validation", "models"),
        *("_page", "plotting", "predictions", "threat"),
    },
    "density": {"_data", "_typing", "_validation", "models"},
    "training": {
        *("_backend", "_data", "_renamed", "_typing", "_validation", "attacks", "models", "predictions", "threat"),
    },
    "evaluation": {
        *("_backend", "_data", "_escape", "_files", "_renamed", "_typing", "_validation", "attacks", "models"),
        *("_intervals", "_page", "_progress", "_schema", "datasets", "plotting", "threat"),
    },
    "callbacks": {
        "_backend",
        "_data",
        "_typing",
        "_validation",
        "evaluation",
        "metrics",
        "models",
        "threat",
        "training",
    },
    "cli": {"_escape", "_files", "_page", "_typing", "datasets", "evaluation", "plotting", "threat"},
}


def part_of(module):
    """Return the part of the package that a dotted module belongs to, "" for the package itself."""
    return [*module.split("."), ""][1]


def imports(path):
    """Return the parts that a file imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            parts |= {part_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "keras_drsl"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "keras_drsl":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            parts |= {part_of(name) for name in names} if node.module == "keras_drsl" else {part_of(node.module)}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return parts


def files():
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    also = MAY_ALSO_IMPORT.get(path.relative_to(PACKAGE).as_posix(), set())
    assert imports(path) - {part} <= MAY_IMPORT[part] | also


def test_training_and_evaluation_do_not_know_each_other():
    assert "evaluation" not in MAY_IMPORT["training"]
    assert "training" not in MAY_IMPORT["evaluation"]


def test_no_part_reaches_itself_through_others():
    assert not any("training" in MAY_IMPORT[part] for parts in MAY_ALSO_IMPORT.values() for part in parts)

    def reachable(part, seen=()):
        for other in MAY_IMPORT[part] - {""}:
            assert other not in seen, f"{part} -> {other} closes a circle"
            reachable(other, (*seen, other))

    for part in MAY_IMPORT:
        reachable(part, (part,))


def test_an_import_of_evaluation_by_training_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def train():\n    from keras_drsl.evaluation import evaluate_robustness\n")
    assert imports(path) - MAY_IMPORT["training"] == {"evaluation"}
    path.write_text("from keras_drsl import evaluation\n")
    assert imports(path) - MAY_IMPORT["training"] == {"evaluation"}


def test_no_files_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in files()}
    graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = found & (set(modules) - {name})
    while graph:
        leaves = {name for name, found in graph.items() if not found & set(graph)}
        assert leaves, sorted(graph)
        graph = {name: found for name, found in graph.items() if name not in leaves}


def test_only_the_backends_ask_which_backend_runs():
    for path in files():
        if "_backend" not in path.parts:
            assert "config.backend" not in path.read_text(), path
