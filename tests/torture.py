"""Kill real runs again and again; what they end with must be, byte for byte, what a quiet run ends with.

python tests/torture.py --folder FOLDER [--engine zero3 fsdp] [--seed 0] [--seconds N] [--short]

Each engine trains in two processes. A kill is SIGKILL of one rank or SIGTERM, at a random moment of a
given phase: while a checkpoint is written, between them, before the first step, or in another stage.
The next command goes on; when all kills are spent or a run has come to its end, it is compared. FOLDER
keeps what has been done: the same command goes on there (--seconds: stop after that long, exit code 75).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from killable import Running, checkpoints, code_of, copy, matches, prepare, scratch, started, until

STAGES = ("prep", "pack", "sft", "merge")
UNFINISHED = 75
# (stage, phase, signal, who is hit, how often)
PLAN = [
    ("prep", "working", "KILL", "one", 1),
    ("pack", "working", "KILL", "one", 1),
    ("sft", "starting", "KILL", "one", 2),
    ("sft", "training", "KILL", "one", 9),
    ("sft", "training", "TERM", "all", 7),
    ("sft", "training", "TERM", "one", 2),
    ("sft", "checkpoint", "KILL", "one", 5),
    ("merge", "working", "KILL", "one", 3),
]
SHORT = [
    ("sft", "training", "KILL", "one", 1),
    ("sft", "checkpoint", "KILL", "one", 1),
    ("merge", "working", "KILL", "one", 1),
]


class Lost(Exception):
    """Something that a kill must not cost."""


class Torture:
    """All kills of one engine."""

    def __init__(self, folder: Path, engine: str, seed: int, plan: list[Any], until: float) -> None:
        self.folder, self.engine, self.seed, self.until = folder / engine, engine, seed, until
        self.prepared, self.file = folder / "prepared", folder / f"{engine}.json"
        kills = [
            dict(zip(("stage", "phase", "signal", "who"), p, strict=False))
            for p in plan
            for _ in range(p[4])
        ]
        random.Random(f"{seed}/{engine}").shuffle(kills)
        self.state: dict[str, Any] = {"waiting": kills, "done": [], "lost": [], "missed": 0}
        self.state |= {"runs": 0, "reference": None}
        if self.file.exists():
            self.state = json.loads(self.file.read_text())

    def keep(self) -> None:
        self.file.write_text(json.dumps(self.state, indent=1))

    def run(self) -> bool:
        """Until all kills are done and compared; False when time is up before."""
        if self.state["reference"] is None:
            self.fresh()
            for stage in STAGES:
                if not self.sealed(stage):
                    self.finish(stage)
            self.state["reference"] = self.results()
            self.keep()
        while self.state["waiting"] or self.state.get("open"):
            if not self.state.get("open"):
                self.fresh()
                self.state["open"] = True
                self.keep()
            for stage in STAGES:
                while self.here(stage) and not self.sealed(stage):
                    if time.monotonic() > self.until:
                        return False
                    self.kill(stage)
                if time.monotonic() > self.until:
                    return False
                if not self.sealed(stage):
                    self.finish(stage)
            self.compare()
        return True

    def here(self, stage: str) -> list[dict[str, Any]]:
        return [kill for kill in self.state["waiting"] if kill["stage"] == stage]

    def fresh(self) -> None:
        """Only the base and the rows are there; in short, prep and pack are sealed as well."""
        shutil.rmtree(self.folder, ignore_errors=True)
        copy(self.prepared, self.folder)

    def sealed(self, stage: str) -> bool:
        return any((self.folder / "runs").glob(f"{stage}-*/manifest.json"))

    def unseal(self, stage: str) -> None:
        """The stage has to run again."""
        for sealed in (self.folder / "runs").glob(f"{stage}-*"):
            for path in (sealed, *sealed.rglob("*")):
                path.chmod(0o755)
            shutil.rmtree(sealed)

    def finish(self, stage: str) -> None:
        """Run a stage that nobody disturbs."""
        before = checkpoints(self.folder)
        with started(self.folder, self.engine, stage=stage) as running:
            code = running.wait()
            if code or not self.sealed(stage):
                raise Lost(f"{stage} failed (exit {code}) undisturbed: {running.said()[-2000:]}")
            self.went_on(stage, running, before)

    def kill(self, stage: str) -> None:
        """Start ``stage``, kill it once, and see all its processes gone."""
        kill = self.here(stage)[0]
        number = len(self.state["done"]) + self.state["missed"]
        chance = random.Random(f"{self.seed}/{self.engine}/{number}")
        before = checkpoints(self.folder)
        with started(self.folder, self.engine, stage=stage) as running:
            self.await_phase(kill, running, len(before) and before[-1].name, chance)
            hit = self.strike(kill, running, chance)
            struck = time.monotonic()
            until(running.ended, 60, running)
            seconds = time.monotonic() - struck
            if not hit or self.sealed(stage):
                self.state["missed"] += 1  # the stage was faster: again, and sooner
                kill["tries"] = kill.get("tries", 0) + 1
                if stage != "sft":
                    self.unseal(stage)
                return self.keep()
            self.went_on(stage, running, before)
            code = code_of(self.folder)
            if kill["signal"] == "TERM" and code != 143:
                raise Lost(f"exit code {code} after SIGTERM: {running.said()[-2000:]}")
        after = checkpoints(self.folder)
        step = int(after[-1].name.split("-")[1]) if after else 0
        self.state["waiting"].remove(kill)
        self.state["done"].append(kill | {"step": step, "seconds": seconds, "rank": hit[0]})
        print(
            f"{self.engine}: kill {len(self.state['done'])}: {kill}, rank {hit[0]}, step {step},"
            f" gone after {seconds:.1f} s",
            flush=True,
        )
        return self.keep()

    def await_phase(
        self, kill: dict[str, Any], running: Running, newest: str | int, chance: random.Random
    ) -> None:
        """Until the run is where the kill wants it, and a random while longer."""

        def trains() -> bool:
            now = checkpoints(self.folder)
            return running.ended() or bool(now and now[-1].name != newest)

        stage = kill["stage"]
        until(lambda: f"{stage}: {stage}-" in running.said() or running.ended(), 120, running)
        if kill["phase"] == "working":
            time.sleep(chance.uniform(0.0, 0.4) / (1 + kill.get("tries", 0)) ** 2)
        elif kill["phase"] == "starting":
            time.sleep(chance.uniform(0.0, 1.0))
        else:
            until(trains, 120, running)
            time.sleep(chance.uniform(0.0, 1.0))
        if kill["phase"] == "checkpoint":
            place, give_up = scratch(self.folder), time.monotonic() + 60
            while place and running.child.poll() is None and time.monotonic() < give_up:
                if matches(place, ".checkpoint-*.tmp"):
                    return

    def strike(self, kill: dict[str, Any], running: Running, chance: random.Random) -> list[int]:
        """Send the signal; the ranks that were hit."""
        ranks = running.ranks()
        hit = sorted(ranks) if kill["who"] == "all" else [chance.choice(sorted(ranks))]
        number = signal.SIGKILL if kill["signal"] == "KILL" else signal.SIGTERM
        try:
            for rank in hit:
                os.kill(ranks[rank], number)
        except ProcessLookupError:
            return []
        return hit

    def went_on(self, stage: str, running: Running, before: list[Path]) -> None:
        """A run that reached training must have gone on at the newest checkpoint."""
        found = re.search(r"sft: going on after step (\d+)", running.said())
        if stage == "sft" and before and found:
            want = int(before[-1].name.split("-")[1])
            if int(found[1]) != want:
                raise Lost(f"checkpoint of step {want} was there, went on after step {found[1]}")

    def results(self) -> dict[str, str]:
        """Every weight file of training and merge, by hash, and what else the merged model has."""
        from pipeline.artifact import hash_file

        wanted = [*(self.folder / "runs").glob("sft-*/epoch-*/*")]
        wanted += [p for p in (self.folder / "runs").glob("merge-*/*") if p.suffix != ".md"]
        skip = ("manifest.json", "certificate.json", ".stamps.json")  # times and inodes
        return {
            str(path.relative_to(self.folder)): hash_file(path).sha256
            for path in sorted(wanted)
            if path.name not in skip
        }

    def compare(self) -> None:
        """The run has come to its end: is it the quiet run?"""
        got, want = self.results(), self.state["reference"]
        differ = [name for name in sorted(set(got) | set(want)) if got.get(name) != want.get(name)]
        self.state["runs"] += 1
        self.state["lost"] += [f"run {self.state['runs']}: {name} differs" for name in differ]
        self.state["open"] = False
        self.keep()
        print(
            f"{self.engine}: run {self.state['runs']} ended, {len(got)} files compared", flush=True
        )


def table(states: dict[str, dict[str, Any]]) -> str:
    """Kills by phase."""
    lines = ["| engine | phase | signal | kills | after step 1 | gone after, median and most |"]
    lines.append("|---|---|---|---|---|---|")
    for engine, state in states.items():
        keys = Counter((k["stage"], k["phase"], k["signal"], k["who"]) for k in state["done"])
        for key, count in sorted(keys.items()):
            kills = [
                k
                for k in state["done"]
                if tuple(k[n] for n in ("stage", "phase", "signal", "who")) == key
            ]
            seconds = sorted(k["seconds"] for k in kills)
            stage, phase, name, who = key
            late = sum(k["step"] > 1 for k in kills) if stage == "sft" else "-"
            words = f"SIG{name} to {'all ranks' if who == 'all' else 'one process'}"
            lines.append(
                f"| {engine} | {stage}: {phase} | {words} | {count} | {late} |"
                f" {seconds[len(seconds) // 2]:.1f} s, {seconds[-1]:.1f} s |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: nothing was lost; 1: something was; 75: time was up."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", nargs="+", default=["zero3", "fsdp"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args(argv)
    give_up = time.monotonic() + options.seconds
    # jobs name paths below UNTAXED_DATA, or absolute ones
    options.folder = options.folder.resolve()
    prepared = options.folder / "prepared"
    if not (prepared / "ready").exists():
        shutil.rmtree(prepared, ignore_errors=True)
        prepare(prepared, rows=40, epochs=3 if options.short else 6, seal=options.short)
        (prepared / "ready").touch()
    states = {}
    for engine in options.engine:
        plan = SHORT if options.short else PLAN
        one = Torture(options.folder, engine, options.seed, plan, give_up)
        try:
            finished = one.run()
        except (Lost, AssertionError) as error:
            one.state["lost"].append(str(error))
            finished = True
        states[engine] = one.state
        if not finished:
            print(f"{engine}: {len(one.state['done'])} kills so far; the same command goes on")
            return UNFINISHED
    kills = sum(len(state["done"]) for state in states.values())
    lost = [f"{engine}: {what}" for engine, state in states.items() for what in state["lost"]]
    missed = sum(state["missed"] for state in states.values())
    runs = sum(state["runs"] for state in states.values())
    print(table(states))
    print(f"{runs} runs compared; {missed} kills came too late and were made again")
    print(f"{kills} kills, {len(lost)} lost")
    for what in lost:
        print(f"lost: {what}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
