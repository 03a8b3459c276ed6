"""Cases of bad input: the machine around a stage: disks, other processes, signals, and bugs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from breaking import Breaking, Case, Place

from pipeline.artifact import Artifact
from pipeline.stage import Context

OTHER_PACK = ["--set", "pack.seed=5"]


def stopped(
    recipe: Any, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    (out / "half.jsonl").write_text("{}")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    raise AssertionError("the signal was not heard")


def with_a_bug(
    recipe: Any, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    (out / "half.jsonl").write_text("{}")
    raise ZeroDivisionError("a message\nof two lines")


def interrupted(
    recipe: Any, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job of a shell
    signal.raise_signal(signal.SIGINT)
    time.sleep(10)
    raise AssertionError("the signal was not heard")


def again(breaking: Callable[[Place], None]) -> Breaking:
    """``pack`` has to run, and then this happens."""

    def broken(p: Place) -> list[str]:
        breaking(p)
        return OTHER_PACK

    return broken


def beyond_the_limit(p: Place) -> None:
    p.source(repeat=2000)
    p.limit_files(4 << 20)


def second_run(p: Place) -> None:
    p.unseal("pack")
    p.hold_lock("pack")


def runs_is_a_file(p: Place) -> list[str]:
    path = p.folder / "taken"
    path.write_text("")
    return ["--runs", str(path)]


def read_only_data(p: Place) -> None:
    """A source that this user may not read."""
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    p.data.chmod(0)


AROUND = [
    Case(
        "disk-full",
        "pack",
        1,
        again(lambda p: p.fill_disk(left=20_000)),
        ("No space left on device", "free space"),
    ),
    Case(
        "disk-full-from-the-start",
        "pack",
        1,
        again(lambda p: p.fill_disk(left=0)),
        ("No space left on device", "free space"),
    ),
    Case(
        "file-size-limit",
        "prep",
        1,
        beyond_the_limit,
        ("runs: File too large", "then run again"),
    ),
    Case(
        "read-only-folder",
        "pack",
        1,
        again(lambda p: p.read_only()),
        ("runs", "ermi" if os.geteuid() else "Read-only file system", "fix permissions"),
    ),
    Case("runs-is-a-file", "pack", 1, runs_is_a_file, ("taken: File exists", "run again")),
    Case("unreadable-rows", "prep", 1, read_only_data, ("train.jsonl", "Permission denied")),
    Case(
        "second-run-at-once",
        "pack",
        1,
        second_run,
        ("another run is building it (process ", "wait for it or stop it"),
    ),
    Case(
        "stopped-by-signal",
        "pack",
        143,
        again(lambda p: None),
        ("stopped by SIGTERM", "run the same command to go on"),
        run=stopped,
    ),
    Case(
        "stopped-by-hand",
        "pack",
        143,
        again(lambda p: None),
        ("pack: stopped", "run the same command to go on"),
        run=interrupted,
    ),
    Case(
        "bug",
        "pack",
        1,
        again(lambda p: None),
        ("unexpected ZeroDivisionError: a message of two lines", "traceback in ", "/logs/pack-"),
        run=with_a_bug,
    ),
]
