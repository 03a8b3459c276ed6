"""The model card: facts that the manifests hold, and no claims."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


def model_card(base: Artifact, sft: Artifact, certificate: Mapping[str, Any]) -> str:
    """README.md of a merged model, from its inputs and its certificate."""
    source = str(base.facts.get("source", base.folder.name))
    commit = base.facts.get("commit")
    rows = [
        ("base", source + (f" at {commit}" if commit else "")),
        ("base digest (SHA-256)", base.digest),
        ("training digest (SHA-256)", sft.digest),
        *_method(certificate),
        ("dtype", certificate["dtype"]),
        ("tensors changed / unchanged", f"{certificate['changed']} / {certificate['unchanged']}"),
        ("share of the update in the file", _number(certificate["survival"]["share"])),
        ("weights digest (SHA-256)", certificate["weights_digest"]),
        *_data(sft.facts),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{_front_matter(base, source)}---

# A merged model

| | |
|---|---|
{table}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder that holds this file
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Evidence

`certificate.json` lists every tensor that changed, how much of its update the file holds, and how
far the logits of the merged model are from those of the base with its adapter.

## Licence

{_licence(base)}
"""


def _method(certificate: Mapping[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("epoch", certificate["epoch"])]
    chosen = certificate.get("chosen")
    if chosen:
        rows += [
            ("scale of the update", _number(certificate["scale"])),
            ("how epoch and scale were chosen", chosen["verdict"]),
            ("choice digest (SHA-256)", chosen["choice_digest"]),
        ]
    if certificate["method"] == "full":
        return [("method", "full fine-tuning"), *rows]
    modules = [str(name) for name in certificate["pairs"]]
    return [
        ("method", "LoRA, merged"),
        *rows,
        ("rank", certificate["rank"]),
        ("factor on B A", _number(certificate["factor"])),
        ("targets", ", ".join(sorted({name.rpartition(".")[2] for name in modules}))),
        ("layers", layer_ranges(modules)),
    ]


def layer_ranges(modules: Iterable[str]) -> str:
    """Layer indices in module names as ranges: ``10-19, 25``."""
    found = {int(m.group(1)) for name in modules if (m := re.search(r"\.layers\.(\d+)\.", name))}
    ranges: list[list[int]] = []
    for index in sorted(found):
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges) or "outside the layers"


def _data(facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    sources = facts.get("sources")
    if not isinstance(sources, Mapping):
        return []
    return [(f"rows from {name}", rows) for name, rows in sorted(sources.items())]


def _front_matter(base: Artifact, source: str) -> str:
    lines = []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        lines.append(f"base_model: {source}\n")
    named = _named_licence(base)
    if named:
        lines.append(f"license: {named}\n")
    return "".join(lines)


def _named_licence(base: Artifact) -> str | None:
    """The ``license:`` line of the base's own model card."""
    if "README.md" not in base.manifest.files:
        return None
    text = base.path("README.md").read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    match = re.search(r"^license:[ \t]*([\w.+-]+)[ \t]*$", text.split("---")[1], re.MULTILINE)
    return match.group(1) if match else None


def _licence(base: Artifact) -> str:
    named = _named_licence(base)
    file = next((name for name in LICENCE_FILES if name in base.manifest.files), None)
    if named:
        return f"The base's model card names: {named}."
    if file:
        return f"{_title(base.path(file))} (the base's own `{file}`, in this folder)."
    return "See the base model."


def _title(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip(" #\t") for line in lines if line.strip(" #\t")), path.name)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
