"""Raw data: adopted once into a sealed folder with one data file, read from there ever after.

Where rows came from is only remembered; their identity is the digest of the file. Torch-free.
"""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.data.sets import set_of
from pipeline.data.tables import suffix_of
from pipeline.errors import DataError, RecipeError
from pipeline.recipes import SourceRecipe

if TYPE_CHECKING:
    from pipeline.graph import Workspace

SAMPLES = Path(__file__).parent / "samples"
GENERIC_REFUSALS = SAMPLES / "refusals.jsonl"
TRUE = {"1", "true", "yes", "on"}


def sample_names() -> list[str]:
    """Names that ``sample:NAME`` knows."""
    return sorted(p.stem for p in SAMPLES.glob("*.jsonl") if p != GENERIC_REFUSALS)


def identity_of(source: SourceRecipe, workspace: Workspace) -> dict[str, str | None]:
    """Where the rows come from, and for a file what it looked like (size and time).

    Filters and columns are left out: sources that read one file differently share its artifact.
    """
    identity: dict[str, str | None] = {
        "source": source.source,
        "revision": source.revision,
        "subset": source.subset,
    }
    if source.public is not None:
        set_of(source)
    if _is_remote(source):
        _hub_id(source)
    else:
        stat = _file(source, workspace).stat()
        identity["fingerprint"] = art.canonical([stat.st_size, stat.st_mtime_ns])
    return identity


def find_source(source: SourceRecipe, workspace: Workspace) -> Artifact | None:
    """The rows of ``source`` if they are adopted already, else None. Writes nothing."""
    try:
        return art.adopted(workspace.runs, "data", identity_of(source, workspace))
    except DataError:
        return None


def place_of(source: SourceRecipe, workspace: Workspace) -> Artifact | Path | None:
    """Where the rows of ``source`` can be read now, adopted or not; None for what would have to be
    fetched or is not there. Writes nothing."""
    found = find_source(source, workspace)
    try:
        return found or (None if _is_remote(source) else _file(source, workspace))
    except DataError:
        return None


def adopt_source(source: SourceRecipe, workspace: Workspace) -> Artifact:
    """The adopted rows of ``source``, adopting them now if needed.

    Raises:
        DataError: no such file, an unknown format, or a dataset that cannot be fetched.
        RecipeError: an unknown sample, or an option that this kind of source does not have.
    """
    identity = identity_of(source, workspace)
    found = art.adopted(workspace.runs, "data", identity)
    if found is not None:
        return found

    def fill(folder: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {"source": source.source, "revision": source.revision}
        if _is_remote(source):
            return facts | _download(source, folder / "rows.parquet")
        # A copy, not a link: sealing makes it read-only, and the user may go on editing theirs.
        path = _file(source, workspace)
        shutil.copyfile(path, folder / f"rows{suffix_of(path.name)}")
        return facts | {"commit": None}

    return art.adopt(workspace.runs, "data", identity, fill)


def _file(source: SourceRecipe, workspace: Workspace) -> Path:
    for key, value in (("revision", source.revision), ("subset", source.subset)):
        if value is not None:
            raise RecipeError(
                f"source {source.name}: {key}={value} is for hub: and set: sources only, not for"
                f" {source.source}; leave it out"
            )
    if source.source.startswith("sample:"):
        name, known = source.source.removeprefix("sample:"), sample_names()
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise RecipeError(
                f"source {source.name}: no sample {name!r}; {hint}known: {', '.join(known)}"
            )
        return SAMPLES / f"{name}.jsonl"
    path = (workspace.data_root / Path(source.source).expanduser()).resolve()
    if not path.is_file():
        got = "is a folder, wanted a file" if path.is_dir() else "no such file"
        there = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, there, n=1)
        hint = f"; did you mean {close[0]}?" if close and not path.is_dir() else ""
        raise DataError(
            f"{source.source}: {got} ({path}){hint}; paths are relative to UNTAXED_DATA"
        )
    suffix_of(source.source)
    return path


def _is_remote(source: SourceRecipe) -> bool:
    return source.source.startswith(("hub:", "set:"))


def _hub_id(source: SourceRecipe) -> str:
    if source.source.startswith("set:"):
        return set_of(source).hub or ""
    name = source.source.removeprefix("hub:")
    if name.count("/") != 1 or not all(name.split("/")):
        raise RecipeError(f"source {source.name}: got {source.source}, wanted hub:org/name")
    return name


def _download(source: SourceRecipe, target: Path) -> dict[str, Any]:
    """Write all splits of a hub dataset to ``target`` with a column ``split``; returns facts."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # of the HTTP client that the hub uses

    name, commit = _hub_id(source), source.revision
    subset: str | None = source.subset
    options: dict[str, Any] = {}
    if source.source.startswith("set:"):
        public = set_of(source)
        subset, options = source.subset or public.subset, public.options
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    offline = any(os.environ.get(switch, "").lower() in TRUE for switch in switches)
    try:
        if not offline:
            commit = HfApi().dataset_info(name, revision=source.revision).sha
        splits = load_dataset(name, subset, revision=commit, **options)
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise DataError(
            f"{source.source}: cannot be fetched ({_first_line(error)}); check id, subset and"
            " network, or give a local file"
        ) from error
    rows = _write(splits, source, target)
    return {"commit": commit, "subset": subset, "offline": offline, "rows": rows}


def _write(splits: dict[str, Any], source: SourceRecipe, target: Path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, rows = [], {}
    for split, dataset in splits.items():
        table = dataset.with_format("arrow")[:]
        if "split" in table.column_names:
            if len(splits) > 1:
                raise DataError(
                    f"{source.source}: has splits and a column 'split' of its own; save the rows"
                    " you want as a local file"
                )
        else:
            table = table.append_column("split", pa.array([split] * len(table), pa.string()))
        tables.append(table)
        rows[split] = len(table)
    try:
        whole = pa.concat_tables(tables, promote_options="default").replace_schema_metadata()
    except pa.ArrowException as error:
        raise DataError(
            f"{source.source}: its splits differ in columns ({_first_line(error)}); save the rows"
            " you want as a local file"
        ) from error
    pq.write_table(whole, target)
    return rows


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
