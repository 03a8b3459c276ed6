"""What stages hand each other: a folder with a manifest, named by a key, sealed by one rename.

``key`` hashes the question (stage, version, recipe, upstream keys) and is known before anything
runs; ``digest`` hashes the answer (file bytes). Torch-free.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import __version__, files, origin
from pipeline.errors import DataError, UntaxedError
from pipeline.files import Stamp

MANIFEST = "manifest.json"
KEY_LENGTH = 16


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    sha256: str


class Hashed(NamedTuple):
    """A file's hash, and what the file system said of the file before it was taken."""

    entry: FileEntry
    stamp: Stamp


class Manifest(BaseModel):
    """Everything that is known of a sealed artifact; the truth that MLflow only indexes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    stage_version: int
    key: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    digest: str
    facts: dict[str, Any]
    seconds: float
    created_at: str
    untaxed_version: str
    revision: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Artifact:
    """An opened, size-checked artifact."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts

    def path(self, name: str) -> Path:
        """Path of one sealed file; DataError when the artifact has no such file."""
        if name not in self.manifest.files:
            raise DataError(
                f"{self.folder}: has no file {name}; holds {sorted(self.manifest.files)}"
            )
        return self.folder / name

    def untouched(self, name: str) -> bool:
        """True if, by the file system's account, nobody wrote to the file since it was hashed."""
        return files.read_stamps(self.folder).get(name) == files.stamp(self.path(name))


def canonical(value: object) -> str:
    """JSON text with one form for each value; TypeError for what has no stable form."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def recipe_key(stage: str, version: int, recipe: object, upstream: Mapping[str, str]) -> str:
    """Merkle key of a stage: 16 hex digits over its name, version, recipe and upstream keys."""
    text = canonical([stage, version, recipe, dict(upstream)])
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:KEY_LENGTH]


def hash_file(path: Path) -> FileEntry:
    """Stream one file through SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return FileEntry(size=size, sha256=digest.hexdigest())


def digest_of(files: Mapping[str, FileEntry]) -> str:
    """Digest of a set of files: over their names and hashes, not their order."""
    text = canonical({name: entry.sha256 for name, entry in files.items()})
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _hash_folder(folder: Path, known: Mapping[str, Hashed]) -> dict[str, Hashed]:
    """A ``known`` hash is taken where the file has not been touched since."""
    result = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, stamp = path.relative_to(folder).as_posix(), files.stamp(path)
        if name in known and known[name].stamp == stamp:
            result[name] = known[name]
        elif name not in (MANIFEST, files.STAMPS):
            result[name] = Hashed(hash_file(path), stamp)
    return result


def open_artifact(folder: Path) -> Artifact:
    """Open a sealed artifact, checking that every file is there at its sealed size."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder}: no sealed artifact here ({MANIFEST} is missing)") from None
    except (ValidationError, UnicodeDecodeError) as error:
        problem = str(error).splitlines()[0]
        raise DataError(
            f"{path}: damaged manifest ({problem}); {_way_out(folder, folder.name)}"
        ) from None
    for name, entry in manifest.files.items():
        target = folder / name
        size = target.stat().st_size if target.is_file() else None
        if size != entry.size:
            got = "missing" if size is None else f"{size} bytes"
            raise DataError(
                f"{target}: {got}, sealed with {entry.size} bytes;"
                f" {_way_out(folder, manifest.stage)}"
            )
    return Artifact(folder, manifest)


def _way_out(folder: Path, stage: str) -> str:
    name = stage.partition("-")[0]
    if name in ("base", "data"):  # adopted, not made by a stage
        return f"remove the folder {folder.name}: it is then taken from its source again"
    return f"rerun stage {name} with --rebuild"


def verify(folder: Path) -> int:
    """Re-hash every file of an artifact; returns how many, raises DataError at the first change."""
    artifact = open_artifact(folder)
    for name, entry in artifact.manifest.files.items():
        got = hash_file(folder / name)
        if got != entry:
            raise DataError(
                f"{folder / name}: content changed since it was sealed (sha256 {got.sha256[:12]},"
                f" sealed {entry.sha256[:12]}); {_way_out(folder, artifact.manifest.stage)}"
            )
    return len(artifact.manifest.files)


@contextlib.contextmanager
def lock(final: Path) -> Iterator[None]:
    """Hold the right to build ``final``; a second process gets an error instead of a race."""
    final.parent.mkdir(parents=True, exist_ok=True)
    path = final.parent / f".{final.name}.lock"
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            raise UntaxedError(
                f"{final.name}: another run is building it (process {owner}); wait for it or stop it"
            ) from None
        stream.seek(0)
        stream.truncate()
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def stage_folder(final: Path) -> Path:
    """A fresh hidden sibling of ``final`` to write into; what a crash left there is removed."""
    staging = final.parent / f".{final.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def seal(
    staging: Path,
    final: Path,
    *,
    stage: str,
    stage_version: int,
    key: str,
    recipe: dict[str, Any],
    inputs: dict[str, str],
    facts: dict[str, Any],
    seconds: float,
    hashed: Mapping[str, Hashed] | None = None,
) -> Artifact:
    """Hash ``staging``, force it to disk, write its manifest last and rename it to ``final`` in one step.

    ``hashed``: what the stage has hashed itself; it is not read again.
    """
    found = _hash_folder(staging, hashed or {})
    entries = {name: one.entry for name, one in found.items()}
    manifest = Manifest(
        stage=stage,
        stage_version=stage_version,
        key=key,
        recipe=recipe,
        inputs=inputs,
        files=entries,
        digest=digest_of(entries),
        facts=facts,
        seconds=round(seconds, 3),
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        untaxed_version=__version__,
        revision=origin.revision(),
        image=origin.image(),
    )
    for path in staging.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:  # a link is somebody's own file
            path.chmod(0o444)
        _sync(path)
    files.write_stamps(staging, {name: one.stamp for name, one in found.items()})
    text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(staging / MANIFEST, text + "\n")
    if final.exists():
        move_aside(final)
    os.rename(staging, final)
    for folder in (final, final.parent):
        _sync(folder)
    return Artifact(final, manifest)


def move_aside(folder: Path) -> Path:
    """Rename ``folder`` to a hidden, dated sibling: replaced, never deleted."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for attempt in range(1000):
        aside = folder.parent / f".{folder.name}.old-{stamp}-{attempt}"
        if not aside.exists():
            os.rename(folder, aside)
            return aside
    raise UntaxedError(f"{folder}: cannot be moved aside; remove its .old- siblings")


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees all of it or none of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def adopt(
    runs: Path,
    kind: str,
    identity: Mapping[str, str | None],
    fill: Callable[[Path], dict[str, Any]],
) -> Artifact:
    """Seal outside content once, under a key that is its digest.

    ``fill`` writes the content into a folder and returns facts. The folder ``runs/<kind>-<digest>``
    and the index entry of ``identity`` (where the content came from) are written atomically.
    """
    pointer = _pointer(runs, kind, identity)
    with lock(runs / f"{kind}-adopt"):
        started = time.monotonic()
        staging = stage_folder(runs / f"{kind}-adopt")
        try:
            facts = fill(staging)
            hashed = _hash_folder(staging, {})
            digest = digest_of({name: found.entry for name, found in hashed.items()})
            final = runs / f"{kind}-{digest[:KEY_LENGTH]}"
            if (final / MANIFEST).exists():
                artifact = open_artifact(final)
            else:
                artifact = seal(
                    staging,
                    final,
                    stage=kind,
                    stage_version=1,
                    key=digest[:KEY_LENGTH],
                    recipe=dict(identity),
                    inputs={},
                    facts=facts,
                    seconds=time.monotonic() - started,
                    hashed=hashed,
                )
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        entry = {"identity": dict(identity), "artifact": final.name}
        write_atomic(pointer, json.dumps(entry, indent=1, sort_keys=True) + "\n")
    return artifact


def adopted(runs: Path, kind: str, identity: Mapping[str, str | None]) -> Artifact | None:
    """The artifact adopted for ``identity``, or None when there is none yet."""
    pointer = _pointer(runs, kind, identity)
    if not pointer.exists():
        return None
    try:
        folder = runs / json.loads(pointer.read_text(encoding="utf-8"))["artifact"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{pointer}: damaged index entry; remove this file and run again") from None
    if not folder.exists():
        return None
    return open_artifact(folder)


def _pointer(runs: Path, kind: str, identity: Mapping[str, str | None]) -> Path:
    name = hashlib.sha256(canonical([kind, dict(identity)]).encode("ascii")).hexdigest()
    return runs / "adopted" / f"{kind}-{name[:KEY_LENGTH]}.json"
