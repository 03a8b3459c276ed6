"""Reading a job file: YAML to a Job, and every mistake in one line with the way out. Torch-free."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import RecipeError
from pipeline.recipes import Job


def _allowed(location: tuple[str | int, ...]) -> list[str]:
    """Field names of the model that ``location`` (without its last part) leads to."""
    model: Any = Job
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            continue
        model = _model_in(fields[part].annotation)
    return sorted(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def _without_alternatives(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """``location`` without the names that pydantic gives to the members of a union."""
    return tuple(part for part in location if isinstance(part, int) or part.isidentifier())


def _explain(error: ValidationError, where: str) -> str:
    """The first problem of ``error`` in one line, with a suggestion for an unknown key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in _without_alternatives(first["loc"]))
    others = len({_without_alternatives(one["loc"]) for one in error.errors()}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        allowed = _allowed(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), allowed, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(allowed)}"
        return f"{where}: unknown key {path}; {hint}{more}"
    if first["type"] == "missing":
        return f"{where}: {path} is missing; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{where}: {path or 'job'}: {message}{got}{more}"


def apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one ``dotted.path=value`` (value in YAML) to ``tree`` in place."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {assignment!r}: wanted dotted.path=value, such as sft.epochs=2")
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(f"--set {path}: {part} is not an index below {len(node)}")
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {path}: {part} holds {node!r}, not a section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {path}: value {text!r} is not YAML") from error
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(f"--set {path}: {last} is not an index below {len(node)}")
        node[int(last)] = value
    else:
        node[last] = value


def parse_job(tree: object, where: str) -> Job:
    """A Job from parsed YAML; RecipeError names the file, the key and the way out."""
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise RecipeError(f"{where}: wanted a mapping at the top, got {got}; see jobs/")
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from error


def load_job(path: Path, assignments: tuple[str, ...] = ()) -> Job:
    """Read a job file and apply ``--set`` assignments."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such job file; see jobs/ for examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(tree, dict):
        for assignment in assignments:
            apply_set(tree, assignment)
    return parse_job(tree, str(path))


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would keep the last one in silence)."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag.endswith(":merge"):
            continue
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} twice, line {key_node.start_mark.line + 1}")
        seen.add(key)
    return loader.construct_mapping(node)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
