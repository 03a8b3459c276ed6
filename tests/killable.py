"""A small real job whose processes may be found, stopped and killed from outside, as a cluster does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts import ROOT, make_model, make_tokenizer, sample_rows

from pipeline import pack, prep, stage
from pipeline.launching import command_of
from pipeline.stage import STATUS_FILE

WAIT_SECONDS = 120.0
JOB: dict[str, Any] = {
    "name": "killable",
    "prep": {
        "sources": [{"name": "harmful", "kind": "refusal", "source": "rows.jsonl"}],
        "decontaminate": False,  # its suite is what it trains on
        "dev_fraction": 0.1,
    },
    "sft": {
        "lora": {
            "rank": 2,
            "targets": ["up_proj"],
            "layers": {"first": 2, "last": 4},
            "dropout": 0.1,
        },
        "optimizer": {"learning_rate": 0.02},
        "batch": {"rows": 4},
        "epochs": 2,
        "precision": "fp32",
    },
    "eval": {
        "suites": [{"name": "harmful", "measures": "harmful", "source": "rows.jsonl", "limit": 4}],
        "gate": [{"metric": "harmful_refusal", "at_least": 0.1}],
    },
    "execution": {"checkpoint_seconds": 0.2},
}


def prepare(folder: Path, rows: int, *, seal: bool = True, **sft: Any) -> Path:
    """A tiny base and ``rows`` rows, with prep and pack sealed if ``seal``; returns ``folder``.

    The job reads rows and base from there, also when the place is copied: they are its identity.
    """
    make_model(folder / "base")
    make_tokenizer(folder / "base")
    lines = [json.dumps(row) for row in sample_rows("harmful")[:rows]]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    job = JOB | {"base": {"source": str(folder / "base")}, "sft": JOB["sft"] | sft}
    job["prep"]["sources"][0]["source"] = str(folder / "rows.jsonl")
    job["eval"]["suites"][0]["source"] = str(folder / "rows.jsonl")
    (folder / "job.yaml").write_text(json.dumps(job))
    if not seal:
        return folder
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for name, run in (("prep", prep.run), ("pack", pack.run)):
            arguments = ["--job", str(folder / "job.yaml"), "--runs", str(folder / "runs")]
            assert stage.main(name, run, arguments) == 0, name
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return folder


@dataclass
class Options:
    """What ``untaxed run`` would be given."""

    runs: Path
    engine: str = "zero3"
    nproc: int = 2
    set: list[str] = field(default_factory=list)
    rebuild: bool = False


class Running:
    """A stage and its launcher, known by the status file that their environment names."""

    def __init__(self, command: list[str], log: Path, status: Path) -> None:
        self.log, self.status = log, str(status)
        environment = {STATUS_FILE: self.status, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        with log.open("w") as stream:
            self.child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> dict[int, dict[str, str]]:
        """Living processes with their environments; ``torchrun`` gives each rank its own session."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                text = (entry / "environ").read_text(errors="replace")  # empty for a zombie
                if f"{STATUS_FILE}={self.status}\0" in text:
                    pairs = text.split("\0")
                    found[int(entry.name)] = dict(p.split("=", 1) for p in pairs if "=" in p)
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks; a rank's recorder has its environment too."""
        found = {
            int(env["RANK"]): pid
            for pid, env in self.members().items()
            if "RANK" in env and "sft.py" in _command(pid)
        }
        return found or {0: self.child.pid}

    def ended(self) -> bool:
        return self.child.poll() is not None and not self.members()

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Until launcher and ranks are gone; the launcher's exit code."""
        until(self.ended, seconds, self)
        return self.child.returncode

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def until(condition: Any, seconds: float, running: Running) -> None:
    """Wait for ``condition``; show what was said if it does not come."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            raise AssertionError(f"waited {seconds:.0f} s in vain; said:\n{running.said()[-3000:]}")
        time.sleep(0.02)


@contextlib.contextmanager
def started(folder: Path, engine: str, *more: str, stage: str = "sft") -> Iterator[Running]:
    """``stage`` of the job in ``folder``, by the command line that ``untaxed run`` uses."""
    nproc = 1 if engine == "single" else 2
    options = Options(folder / "runs", engine, nproc, list(more))
    command = command_of(stage, folder / "job.yaml", options)  # type: ignore[arg-type]
    status = folder / "status"
    status.unlink(missing_ok=True)
    running = Running(command, folder / f"{stage}.log", status)
    try:
        yield running
    finally:
        running.end()


def code_of(folder: Path) -> int:
    """The exit code of the rank that ended first before its time; 0 without one."""
    status = folder / "status"
    return int(status.read_text()) if status.exists() else 0


def scratch(folder: Path, stage: str = "sft") -> Path | None:
    """The scratch folder of the stage that runs."""
    return next(iter(matches(folder / "runs", f".{stage}-*.scratch")), None)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = scratch(folder)
    return matches(found, "checkpoint-*") if found else []


def matches(folder: Path, pattern: str) -> list[Path]:
    """What is there now, sorted; a folder that the run renames meanwhile holds nothing."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


def adapters(folder: Path) -> dict[str, bytes]:
    """Every file of the sealed training that holds weights."""
    return {
        str(path.relative_to(folder / "runs")): path.read_bytes()
        for path in sorted((folder / "runs").glob("sft-*/epoch-*/*.safetensors"))
    }


def copy(prepared: Path, folder: Path) -> Path:
    """Another place with the same sealed artifacts and job."""
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder


if __name__ == "__main__":  # python tests/killable.py FOLDER: prepare one by hand
    prepare(Path(sys.argv[1]), 24)
