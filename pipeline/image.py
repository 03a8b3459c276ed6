"""``untaxed doctor --image``: what the image promises, looked at from inside a container."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline import origin
from pipeline.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "docker" / "requirements.txt"
ENTRYPOINT = ROOT / "docker" / "entrypoint.py"
SBOM = Path("/opt/venv/sbom.cdx.json")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s\\]+)", re.MULTILINE)
WRITTEN = (
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "TRITON_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
)
IMPORTED = ("torch", "deepspeed", "transformers", "peft", "datasets", "mlflow", "kubernetes")
SHM_BYTES = 64_000_000  # what a container runtime gives unasked
CAPABILITIES = re.compile(r"^CapEff:\s*([0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    good: bool
    said: str


def examine() -> Iterator[Check]:
    """All checks, in the order in which one would look."""
    uid = os.getuid()
    yield Check("user", uid != 0, f"user {uid}; wanted any but root")
    found = CAPABILITIES.search(Path("/proc/self/status").read_text(encoding="ascii"))
    held = int(found[1], 16) if found else 0
    yield Check("capabilities", held == 0, f"{held:#x} in effect; wanted none")
    yield _is_read_only(ROOT)
    for name in WRITTEN:
        yield _is_written(name)
    free = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    yield Check(
        "/dev/shm", free >= SHM_BYTES, f"{free / 1e6:,.0f} MB; wanted {SHM_BYTES / 1e6:.0f}"
    )
    yield _locked()
    yield Check("parts list", SBOM.exists(), f"{_components()} components in {SBOM}")
    yield Check("entry point", ENTRYPOINT.exists(), str(ENTRYPOINT))
    revision = origin.revision()
    known = revision not in (None, "unknown")
    yield Check("revision", known, f"{revision}; build with docker/build.sh from a checkout")
    for name in IMPORTED:
        yield _imports(name)
    yield _computes()


def _is_read_only(folder: Path) -> Check:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("root file system", True, f"{folder}: {error.strerror}")
    return Check("root file system", False, f"{folder} can be written; run with --read-only")


def _is_written(name: str) -> Check:
    folder = os.environ.get(name)
    if not folder:
        return Check(name, False, "is not set")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(name, False, f"{folder}: {error.strerror}; mount a writable /tmp")
    return Check(name, True, f"{folder} can be written")


def _locked() -> Check:
    if not LOCK.exists():
        return Check("packages", False, f"{LOCK} is missing")
    pins = dict(PIN.findall(LOCK.read_text(encoding="utf-8")))
    other = [
        f"{name} {_version(name)}" for name, wanted in pins.items() if _version(name) != wanted
    ]
    said = f"{len(pins) - len(other)} of {len(pins)} as locked"
    return Check("packages", not other, said + (f"; not {', '.join(other[:3])}" if other else ""))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(missing)"


def _components() -> int:
    if not SBOM.exists():
        return 0
    return len(json.loads(SBOM.read_text(encoding="utf-8")).get("components", ()))


def _imports(name: str) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:  # what a broken package raises is not known beforehand
        return Check(name, False, f"cannot be imported: {error}")
    return Check(name, True, _version(name))


def _computes() -> Check:
    """A product on the device that training would use."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        product = torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        good = bool((product == 64).all())
    except RuntimeError as error:
        return Check("device", False, f"{device}: {error}")
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    return Check("device", good, f"{device}, {name}")


def doctor(console: Console, look: Callable[[], Iterator[Check]] = examine) -> int:
    """Print every check. DataError where one is not as it should be."""
    wrong = []
    for check in look():
        mark = "[green]ok[/]  " if check.good else "[red]bad[/] "
        console.print(f"{mark} {check.name}: ", end="")
        console.print(check.said, markup=False, highlight=False, soft_wrap=True)
        wrong += [] if check.good else [check.name]
    if wrong:
        raise DataError(f"image: {', '.join(wrong)}: not as the image should be")
    return 0
