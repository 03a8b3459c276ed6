"""A rank that is dead, stopped or hung is named, and the others end instead of waiting for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from parts import ROOT

from pipeline.errors import DataError, Stopped
from pipeline.train.watch import Beat, Heard, judge

PATIENCE = 4.0


def heard(
    joined: int, spoke: float = 0.0, moved: float = 0.0, left: tuple[int, int, str] | None = None
) -> Heard:
    """A rank at step 3 that last spoke and moved so many seconds ago."""
    beat = Beat("node", count=1, joined=joined, at="step 3", left=left)
    return Heard(beat, 1000.0 - spoke, 1000.0 - moved)


def verdict(*ranks: Heard) -> tuple[int, str] | None:
    found = judge(dict(enumerate(ranks)), 0, 1000.0, silence=20.0, patience=60.0)
    return found and (found.rank, found.message)


def test_nobody_is_at_fault_while_all_speak_and_move() -> None:
    assert verdict(heard(5), heard(5)) is None
    assert verdict(heard(6, moved=50), heard(5, moved=50)) is None  # slow, but not yet too slow
    assert verdict(heard(6, moved=3600), heard(5, moved=1)) is None  # waits for one that works
    assert verdict(heard(5, moved=1), heard(5, moved=3600)) is None  # nobody waits for it


def test_a_silent_rank_is_dead() -> None:
    said = "rank 1 on node is dead or stopped: not heard of for 21 s, last at step 3"
    assert verdict(heard(5), heard(5, spoke=21)) == (1, said)


def test_the_rank_for_which_others_wait_hangs() -> None:
    waits, hangs = heard(9, moved=70), heard(8, moved=71)
    found = verdict(waits, waits, hangs, waits)
    assert found is not None and found[0] == 2
    assert found[1] == (
        "rank 2 on node hangs: no progress for 71 s, at step 3, while other ranks wait for it"
    )


def test_where_all_have_joined_the_network_has_failed() -> None:
    found = verdict(heard(8, moved=70), heard(8, moved=71))
    assert found is not None and "a collective of rank 0 on node, rank 1 on node" in found[1]


def test_one_that_has_left_says_why_and_for_whom() -> None:
    ill = heard(5, left=(65, 2, "rank 2: broken rows"))
    assert verdict(heard(5), ill, heard(5, spoke=99)) == (2, "rank 2: broken rows")
    found = judge({0: heard(1), 1: ill}, 0, 1000.0, silence=20.0, patience=60.0)
    assert found is not None and isinstance(found.error(), DataError)
    stopped = heard(5, left=(143, 1, "stopped on request"))
    found = judge({0: heard(1), 1: stopped}, 0, 1000.0, silence=20.0, patience=60.0)
    assert found is not None and isinstance(found.error(), Stopped)


def test_one_that_came_to_its_end_is_not_missed() -> None:
    done = heard(5, spoke=500, moved=500, left=(0, 1, "done"))
    assert verdict(heard(5, moved=1), done) is None


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fate of either rank, in pairs of real processes."""
    folder = tmp_path_factory.mktemp("fates")
    script = str(Path(__file__).parent / "fates.py")
    subprocess.run(
        [sys.executable, script, str(folder), str(PATIENCE)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=200,
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("fate", "code", "words"),
    [
        ("killed", 1, "dead or stopped"),
        ("frozen", 1, "dead or stopped"),
        ("hangs", 1, "hangs: no progress for"),
        ("refuses", 65, "has seen broken rows"),
    ],
)
def test_the_other_rank_ends_and_names_it(
    played: Path, fate: str, victim: int, code: int, words: str
) -> None:
    name = f"{fate}-{victim}-{1 - victim}"
    outcome = json.loads((played / "outcomes.json").read_text())[name]
    last = (played / f"{name}.txt").read_text().strip().splitlines()[-1]
    where = "" if fate == "refuses" else f" on {socket.gethostname()}"
    assert last.startswith(f"sft: rank {victim}{where}") and words in last
    assert outcome["code"] == code
    # a busy machine gets some slack
    assert outcome["ended"] - float((played / f"{fate}-{victim}.met").read_text()) < PATIENCE + 20


@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_long_wait_for_one_that_works_is_no_failure(played: Path, victim: int) -> None:
    outcomes = json.loads((played / "outcomes.json").read_text())
    assert [outcomes[f"works-{victim}-{rank}"]["code"] for rank in (0, 1)] == [0, 0]
