"""The short torture: one rank killed while it trains and while it checkpoints, and a killed merge."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torture


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_runs_end_as_quiet_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--short", "--engine", "fsdp", "--folder", str(tmp_path)]
    code = torture.main(arguments)
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.splitlines()[-1] == "3 kills, 0 lost"
    rows = [line for line in said.splitlines() if re.match(r"\| fsdp \|", line)]
    assert len(rows) == 3
    done = json.loads((tmp_path / "fsdp.json").read_text())["done"]
    assert all(kill["step"] >= 1 for kill in done if kill["stage"] == "sft")

    # what differs is found: another reference, and no rank left to kill
    changed = json.loads((tmp_path / "fsdp.json").read_text())
    name = next(n for n in changed["reference"] if n.endswith("adapter_model.safetensors"))
    assert any("merge-" in n and n.endswith(".safetensors") for n in changed["reference"])
    changed["reference"][name] = "0" * 64
    (tmp_path / "fsdp.json").write_text(json.dumps(changed | {"open": True}))
    assert torture.main(arguments) == 1
    out = capsys.readouterr()
    assert out.out.splitlines()[-1] == "3 kills, 1 lost" and f"{name} differs" in out.err
