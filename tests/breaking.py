"""A small project with sealed stages that a case of bad input may break, and ways to break it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from parts import make_model, make_tokenizer, sample_rows

from pipeline.artifact import MANIFEST
from pipeline.data.rows import spread
from pipeline.graph import Workspace, plan_job
from pipeline.jobfile import apply_set, load_job
from pipeline.stage import Run, main

ROOT = Path(__file__).resolve().parents[1]
ROWS = 16
JOB: dict[str, Any] = {
    "name": "broken",
    "base": {"source": "./base"},
    "prep": {
        "sources": [
            {
                "name": "train",
                "kind": "refusal",
                "source": "data/train.jsonl",
                "columns": {"response": "response", "category": "category"},
            }
        ],
        "dev_fraction": 0.1,
    },
    "pack": {"max_length": 256},
    "sft": {
        "lora": {"rank": 1, "targets": ["up_proj"]},
        "optimizer": {"learning_rate": 1e-7},
        "batch": {"rows": 8},
        "epochs": 1,
    },
    "eval": {
        "suites": [
            {
                "name": "harmful",
                "measures": "harmful",
                "source": "sample:harmful",
                "where": {"split": "heldout"},
                "limit": 4,
            }
        ],
        "gate": [{"metric": "harmful_refusal", "at_least": 0.9}],
    },
}
HOLD = (
    "import sys, time; from pathlib import Path; from pipeline.artifact import lock\n"
    "with lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
)
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_base(folder: Path) -> None:
    """A tiny bf16 model in several files, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    make_model(folder, **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer(folder)


@dataclass
class Place:
    """One copy of the project. Ways of breaking it return more options for the command line."""

    folder: Path
    job: dict[str, Any]
    text: str | None = None  # the job file itself, instead of ``job``
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "train.jsonl"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def write_job(self) -> Path:
        path = self.folder / "job.yaml"
        if not path.exists():
            path.write_text(self.text if self.text is not None else json.dumps(self.job))
        return path

    def set(self, **values: Any) -> None:
        """Assign by path, where ``__`` stands for the dot."""
        for path, value in values.items():
            apply_set(self.job, f"{path.replace('__', '.')}={json.dumps(value)}")

    def source(self, **values: Any) -> None:
        """Change the training source."""
        self.job["prep"]["sources"][0] |= values

    def drop(self, *path: str | int) -> None:
        node: Any = self.job
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]

    def file(self, name: str, content: bytes | str) -> None:
        """Another data file, and the training source reads it."""
        raw = content.encode() if isinstance(content, str) else content
        (self.folder / "data" / name).write_bytes(raw)
        self.source(source=f"data/{name}")

    def line(self, number: int, content: bytes | str | dict[str, Any]) -> None:
        """Replace one line of the data file."""
        if isinstance(content, dict):
            content = json.dumps(content)
        lines = self.data.read_bytes().split(b"\n")
        lines[number - 1] = content.encode() if isinstance(content, str) else content
        self.data.write_bytes(b"\n".join(lines))

    def sealed(self, stage: str) -> Path:
        (found,) = self.runs.glob(f"{stage}-*")
        return found

    @property
    def rows(self) -> Path:
        """The adopted copy of the data file."""
        (entry,) = [p for p in (self.runs / "adopted").iterdir() if "train.jsonl" in p.read_text()]
        return self.runs / str(json.loads(entry.read_text())["artifact"]) / "rows.jsonl"

    def unseal(self, stage: str) -> Path:
        """Remove the sealed folder of a stage, so that it is to run again; returns where it was."""
        folder = self.sealed(stage)
        shutil.rmtree(folder)
        return folder

    def hold_lock(self, stage: str) -> None:
        """Another process builds that stage."""
        job = load_job(self.write_job())
        folder = plan_job(job, Workspace(self.runs), adopt=False)[stage].folder
        command = [sys.executable, "-c", HOLD, str(folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
        self.stack.callback(child.wait)
        self.stack.callback(child.kill)
        assert child.stdout is not None and child.stdout.readline() == b"held\n"

    def fill_disk(self, left: int) -> None:
        """Move the artifacts to a file system of their own with ``left`` bytes free."""
        aside = self.runs.rename(self.folder / "aside")
        self.runs.mkdir()
        size = sum(p.stat().st_size + 4096 for p in aside.rglob("*")) + (1 << 20)
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.runs))
        self.stack.callback(subprocess.run, ["umount", "-l", str(self.runs)], check=True)
        shutil.copytree(aside, self.runs, dirs_exist_ok=True)
        room = os.statvfs(self.runs)
        (self.runs / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - left))

    def read_only(self) -> None:
        """Nothing below the artifacts' folder can be written any more."""
        if os.geteuid() != 0:
            self.runs.chmod(0o555)
            self.stack.callback(self.runs.chmod, 0o755)
            return
        mount("--bind", str(self.runs), str(self.runs))
        self.stack.callback(subprocess.run, ["umount", "-l", str(self.runs)], check=True)
        mount("-o", "remount,ro,bind", str(self.runs))

    def limit_files(self, size: int) -> None:
        """No file can grow beyond ``size`` bytes, as under ``ulimit -f``."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    def snapshot(self) -> dict[str, bytes]:
        """Names of what is in the artifacts' folder, each with its manifest."""
        manifests = {p.name: p / MANIFEST for p in self.runs.iterdir()}
        return {n: m.read_bytes() if m.is_file() else b"" for n, m in manifests.items()}


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


Breaking = Callable[[Place], list[str] | None]


@dataclass(frozen=True)
class Case:
    """What is broken, the stage that meets it, and the exit code and words that must come of it.

    ``run`` replaces the stage's function where the shell around it is what is tried.
    """

    name: str
    stage: str
    code: int
    broken: Breaking
    says: tuple[str, ...]
    run: Run | None = None
    progress: int = 0  # lines that the stage says before it fails


def start(name: str, arguments: list[str]) -> int:
    """One stage through its shell, in this process."""
    return main(name, import_module(f"pipeline.{name}").run, arguments)


def make_place(folder: Path) -> Place:
    """The project with prep, pack and sft sealed by their own stages."""
    make_base(folder / "base")
    (folder / "data").mkdir()
    place = Place(folder, json.loads(json.dumps(JOB)))
    rows = spread([row for row in sample_rows("harmful") if row["split"] == "train"], ROWS)
    place.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--job", str(place.write_job()), "--runs", str(place.runs)]
    for stage in ("prep", "pack", "sft"):
        assert start(stage, arguments) == 0
    (folder / "job.yaml").unlink()
    return place
