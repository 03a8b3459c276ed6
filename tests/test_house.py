"""The house rules: who may import whom, names, sizes, ASCII, and the frozen command line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline.graph import STAGES
from pipeline.stage import arguments

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pipeline"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in ("pipeline", "tests", "docker", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
TEXTS = sorted(
    path
    for folder in ("pipeline", "tests", "docker", "benchmarks", "jobs", "ds_configs", "k8s")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".yaml", ".json", ".jsonl", ".sh", ".jinja", ".md"}
)
NO_TORCH = {
    "recipes",
    "jobfile",
    "artifact",
    "files",
    "graph",
    "stage",
    "cli",
    "errors",
    "launching",
    "planning",
    "summary",
}
HEAVY = {"torch", "transformers", "deepspeed", "mlflow", "datasets", "peft", "matplotlib"}
FUNCTION_LINES = 80
FILE_LINES = 350

# What each part may import from the package besides itself. A part is a file at the top or a folder.
PARTS = {"recipes", "artifact", "errors", "files"}
MADE_OF = {"data", "model", "train", "evals"}
SHELL = {"graph", "stage", "tracking"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "recipes": {"errors"},
    "jobfile": {"errors", "recipes"},
    "files": set(),
    "origin": set(),
    "image": {"errors", "origin", "__init__"},
    "artifact": {"errors", "__init__", "files", "origin"},
    "data": PARTS,
    "model": PARTS,
    "train": PARTS | {"data", "model"},
    "evals": PARTS | {"data", "model"},
    "graph": PARTS | {"data", "model"},
    "spool": PARTS | {"graph"},
    "releasing": PARTS,
    "registry": PARTS | {"spool", "releasing"},
    "reach": {"errors"},
    "tracking": PARTS | {"graph", "spool", "registry", "reach"},
    "recorder": {"tracking"},
    "stage": PARTS | {"jobfile", "graph", "tracking", "recorder"},
    **dict.fromkeys(STAGES, PARTS | MADE_OF | SHELL),
    "launching": PARTS | SHELL,
    "planning": PARTS | SHELL | {"data", "model"},
    "warm": {"tracking"},
    "summary": PARTS | SHELL | {"evals"},
    "doctor": PARTS | MADE_OF | SHELL | {"launching"},
    "cluster": PARTS | SHELL | {"jobfile", "origin"},
    "cli": PARTS
    | SHELL
    | {
        "jobfile",
        "launching",
        "planning",
        "summary",
        "doctor",
        "model",
        "releasing",
        "cluster",
        "image",
    },
}
# Names of types alone, never imported when the program runs.
MAY_NAME: dict[str, set[str]] = {
    "data": {"graph"},
    "model": {"graph"},
    "train": {"stage"},
    "evals": {"stage"},
}
COMMAND_LINE = {
    "--job": ("--job",),
    "--set": ("--set",),
    "--rebuild": ("--rebuild",),
    "--runs": ("--runs",),
}
TRAINING_ONLY = {
    "--ds": ("--ds",),
    "--engine": ("--engine",),
    "--local_rank": ("--local_rank", "--local-rank"),
}


@dataclass(frozen=True)
class Import:
    """One import statement: the module, whether it runs as the file is imported, and its line."""

    module: str
    at_once: bool
    for_types: bool
    line: int


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), True, False)


def _imports(node: ast.AST, at_once: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, at_once, for_types, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            for name in child.names:
                whole = f"{child.module}.{name.name}"
                is_module = child.module == "pipeline" or (
                    (ROOT / (whole.replace(".", "/") + ".py")).exists()
                )
                module = whole if is_module else str(child.module)
                yield Import(module, at_once, for_types, child.lineno)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, at_once and not inside and not types, for_types or types)


def part_of(module: str) -> str:
    """The file at the top of the package, or the folder, that a module of it belongs to."""
    name = module.split(".")[1] if "." in module else "__init__"
    known = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    return name if known else "__init__"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_sees_imports_in_functions_and_for_types(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import json\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from pipeline.stage import Context\n"
        "def f():\n    import torch\n    from pipeline import artifact\n"
        "class C:\n    import pipeline.data.rows\n"
    )
    assert [(i.module, i.at_once, i.for_types) for i in imports(path)] == [
        ("json", True, False),
        ("typing", True, False),
        ("pipeline.stage", False, True),
        ("torch", False, False),
        ("pipeline.artifact", False, False),
        ("pipeline.data.rows", True, False),
    ]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(module_of(path))
    for found in imports(path):
        if not found.module.startswith("pipeline"):
            continue
        wanted = MAY_IMPORT[part] | {part}
        if found.for_types:
            wanted |= MAY_NAME.get(part, set())
        target = part_of(found.module)
        where = f"{relative(path)}:{found.line}"
        assert target in wanted, f"{where}: {part} may not import {found.module}"


def test_no_stage_is_allowed_another_stage() -> None:
    assert set(STAGES) == {"prep", "anchor", "pack", "sft", "choose", "merge", "baseline", "eval"}
    for part, allowed in MAY_IMPORT.items():
        assert not allowed & set(STAGES), f"{part} would import a stage"
    assert {part_of(module_of(path)) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_the_frame_is_light_to_import(name: str) -> None:
    """Also through what it imports: no heavy library comes in with these modules."""
    folder = PACKAGE / name
    waiting = sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]
    seen = set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for found in imports(path):
            if not found.at_once:
                continue
            top = found.module.split(".")[0]
            assert top not in HEAVY, f"{relative(path)}:{found.line}: {found.module}"
            if top == "pipeline":
                inner = ROOT / (found.module.replace(".", "/") + ".py")
                waiting.append(inner if inner.exists() else PACKAGE / "__init__.py")


def test_only_tracking_imports_mlflow() -> None:
    users = {
        relative(path)
        for path in FILES
        if any(found.module.split(".")[0] == "mlflow" for found in imports(path))
    }
    assert users <= {"pipeline/tracking.py"}


def test_no_module_shadows_another() -> None:
    """``deepspeed pipeline/sft.py`` puts the package's folder first on the module path."""
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    names -= {"__init__", "__pycache__", "py"}
    installed = {
        name
        for name, owners in packages_distributions().items()
        if any(owner != "untaxed" for owner in owners)
    }
    assert {"torch", "yaml", "transformers"} <= installed
    assert not names & set(sys.stdlib_module_names)
    assert not names & installed
    assert not names & {"tokenize", "select", "evaluate", "datasets", "utils", "helpers", "common"}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= FILE_LINES, f"{relative(path)} has {lines} lines, wanted at most {FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= FUNCTION_LINES, f"{relative(path)}: {node.name} has {size} lines"


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_sources_are_ascii(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        assert line.isascii(), f"{relative(path)}:{number}: {line.decode()}"


def test_no_catch_all_module() -> None:
    names = {path.stem for path in SOURCES}
    assert not names & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_the_command_line_is_frozen(name: str) -> None:
    """Experiments are files: a new option here needs a very good reason."""
    wanted = dict(COMMAND_LINE) | (TRAINING_ONLY if name == "sft" else {})
    actions = [a for a in arguments(name)._actions if a.dest != "help"]
    assert {a.option_strings[0]: tuple(a.option_strings) for a in actions} == wanted
    assert not any(a.required for a in actions)


def test_abbreviations_are_refused_and_the_launchers_rank_is_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert arguments("sft").parse_args(["--local_rank=3"]).local_rank == 3
    with pytest.raises(SystemExit):
        arguments("prep").parse_args(["--rebui"])
    assert "--rebui" in capsys.readouterr().err
