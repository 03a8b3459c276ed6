"""One packed data set and one two-process launch, shared by the training tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parts import adopt_folder
from training import Launch, make_pack

from pipeline.artifact import Artifact


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> dict[str, Artifact]:
    """A tiny base and 20 steps of packed rows: refusals and anchors."""
    runs = tmp_path_factory.mktemp("inputs")
    base = adopt_folder(runs, base_folder)
    return {"base": base, "pack": make_pack(runs, base, epochs=10)}


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run sft in two processes for each of several engines; a run may state inputs of its own."""

    def run(runs: list[dict[str, Any]], inputs: dict[str, Artifact], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "spec.json"
        told = []
        for each in runs:
            read = each.get("inputs", inputs)
            told.append(each | {"inputs": {name: str(read[name].folder) for name in read}})
        spec.write_text(json.dumps(told))
        worker = str(Path(__file__).parent / "worker.py")
        done = subprocess.run(
            [sys.executable, worker, str(spec)], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run
