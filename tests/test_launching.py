"""Stages that ``untaxed run`` forks: what may be imported before a fork, and a stop at any time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from parts import ROOT

pytestmark = pytest.mark.slow

FORK = """
import os, signal, sys, threading
import pipeline.warm, numpy, torch
assert {"torch", "transformers", "mlflow"} <= set(sys.modules)
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
child = os.fork()
if child == 0:
    signal.alarm(60)  # threads that the fork has lost would be waited for
    assert torch.get_num_threads() == 2
    wide = torch.randn(700, 700)
    numpy.testing.assert_allclose((wide @ wide).numpy(), wide.numpy() @ wide.numpy(), atol=1e-2)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_of_what_is_imported_computes_on_all_threads() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def job_of(folder: Path, base: Path) -> Path:
    """A job whose anchor stage takes its time."""
    asked = {"source": "sample:ordinary", "name": "ordinary", "kind": "anchor", "limit": 60}
    suite = {"source": "sample:harmful", "name": "harmful", "measures": "harmful", "limit": 4}
    path = folder / "job.yaml"
    job = {
        "name": "stopped",
        "base": {"source": str(base)},
        "prep": {"sources": [asked]},
        "anchor": {"max_new_tokens": 300, "truncated": "keep", "batch_rows": 4},
        "sft": {"anchors": {"objective": "kl"}},
        "eval": {
            "suites": [suite | {"max_new_tokens": 4}],
            "gate": [{"metric": "harmful_refusal", "at_least": 0.5}],
        },
    }
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.parametrize("line", ["[1/7] prep: to run", "anchor: anchor-"])
def test_a_stop_is_passed_on_while_a_stage_starts_and_while_it_runs(
    tmp_path: Path, base_folder: Path, line: str
) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "run", "--runs", str(tmp_path / "runs")]
    command += ["--job", str(job_of(tmp_path, base_folder))]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        said = []
        for words in run.stderr:
            said.append(words)
            if words.startswith(line):
                run.send_signal(signal.SIGTERM)
                break
        said += run.stderr.readlines()
        assert run.wait(60) == 143, said
    assert not any("Traceback" in words for words in said)
    assert not list((tmp_path / "runs").glob("anchor-*"))
