"""The merging and packing benchmarks at tiny sizes: every system runs and every number is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from parts import ROOT

from pipeline.artifact import Artifact

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_merging_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "merge.json"
    options = ["--json", str(file), "--rounds", "1", "--size", "tiny"]
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "merge.py"), *options], check=True)
    data = json.loads(file.read_text())
    cells = data["cells"]
    assert set(cells) == {"untaxed", "untaxed_without_probes", "peft", "cp"}
    assert all(cell["seconds"]["median"] > 0 and cell["rounds"] == 1 for cell in cells.values())
    written = {name: cell["written_bytes"]["median"] for name, cell in cells.items()}
    assert written["untaxed_without_probes"] < data["weights_bytes"] <= written["cp"]
    assert data["ratios"]["untaxed_speed_vs_peft"] > 0


def test_near_duplicates_side_by_side() -> None:
    """MinHash is not installed here; the exact index is, in a process of its own as in this one."""
    import dedup as benchmark

    prompts = benchmark.read_prompts([])
    made = benchmark.mixtures(prompts, 400)
    assert len(prompts) > 1500 and made == benchmark.mixtures(prompts, 400)
    dropped = benchmark.exact(made)
    assert 20 < len(dropped) < 120, "a quarter of the rows are changed a little"
    cell = str(ROOT / "benchmarks" / "dedup.py")
    runs = benchmark.run_ranks([cell, "exact"], {"rows": 400, "tables": []})
    assert runs[0]["dropped"] == dropped
    half = runs[0] | {"dropped": [*dropped[::2], -1]}
    found = benchmark.report({"runs": {"exact": runs, "minhash": [half]}})
    assert found["cells"]["exact"]["recall"] == found["cells"]["exact"]["precision"] == 1.0
    wanted = len(dropped[::2])
    assert found["cells"]["minhash"]["recall"] == wanted / len(dropped)
    assert found["cells"]["minhash"]["precision"] == wanted / (wanted + 1)
    assert found["ratios"]["minhash_seconds_vs_exact"] == 1.0


def test_packing_side_by_side(tmp_path: Path, base: Artifact) -> None:
    import pack as benchmark

    from pipeline import artifact as art

    rows = benchmark.make_rows(300)
    pairs = {(row["messages"][0]["content"], row["response"]) for row in rows}
    assert len(pairs) > 290  # a few samples are the same text
    staging = art.stage_folder(tmp_path / "prep")
    (staging / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (staging / "dev.jsonl").write_text("")
    sealed = art.seal(
        staging,
        tmp_path / "prep",
        stage="prep",
        stage_version=1,
        key="test",
        recipe={},
        inputs={},
        facts={},
        seconds=0.0,
    )
    spec = {
        "base": str(base.folder),
        "prep": str(sealed.folder),
        "max_length": 512,
        "batch_tokens": 4096,
        "ranks": 8,
    }
    cell = str(ROOT / "benchmarks" / "pack_cell.py")
    runs = {name: benchmark.run_ranks([cell, name], spec) for name in ("untaxed", "trl")}
    found = benchmark.report({"runs": runs})
    ours, theirs = (found["cells"][name] for name in ("untaxed", "trl"))
    assert 0 < theirs["tokens"] - ours["tokens"] <= 300, "TRL keeps the line break after the end"
    assert ours["efficiency"] > 0.8 and 0 <= ours["imbalance"] < 0.05
    assert found["ratios"]["untaxed_vs_trl"] > 0
