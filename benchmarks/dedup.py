"""Near-duplicates side by side: this project's exact index, and MinHash (datasketch, not installed
with the project).

python benchmarks/dedup.py --json FILE [--rows 50000] [--rounds 3] [--tables FILE:COLUMN ...]

Prompts are mixtures: the first half of one prompt and the second half of another, of the samples and
of those tables; every fourth is an earlier one with one or two words dropped, doubled or exchanged.
All systems drop a prompt that is at least 0.8 similar, by the Jaccard similarity of word sets, to one
that was kept before. ``minhash`` goes by its own estimate; ``minhash_checked`` compares the word sets
of its candidates. Recall and precision are held against the exact index. Seconds are of the processor,
and with the peak of resident memory those of a new process for each run, from the prompts on.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rounds import ROOT, in_turn, load, print_ratios, run_ranks, spread

from pipeline.data.dedup import near_duplicates, words
from pipeline.data.tables import read_table

SAMPLES = ROOT / "pipeline" / "data" / "samples"
NAMES = ("harmful", "borderline", "ordinary", "arithmetic")
SYSTEMS = ("exact", "minhash", "minhash_checked")
THRESHOLD = 0.8
PERMUTATIONS = 128


def read_prompts(tables: Sequence[str]) -> list[str]:
    columns = [(str(SAMPLES / f"{name}.jsonl"), "prompt") for name in NAMES]
    columns += [(path, column) for path, _, column in (table.rpartition(":") for table in tables)]
    prompts = [
        record.values[column] for path, column in columns for record in read_table(Path(path), path)
    ]
    return list(dict.fromkeys(prompts))


def mixtures(prompts: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """``count`` prompts that read like ``prompts``, a quarter of them like an earlier one."""
    rng = random.Random(seed)
    made: list[str] = []
    for number in range(count):
        if number % 4 == 3:
            said = rng.choice(made).split()
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(said))
                other = rng.choice(rng.choice(prompts).split())
                said[at : at + 1] = rng.choice(([], [said[at], other], [other]))
                said = said or [other]
        else:
            first, second = rng.choice(prompts).split(), rng.choice(prompts).split()
            said = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
        made.append(" ".join(said))
    return made


def exact(prompts: Sequence[str]) -> list[int]:
    return [match.index for match in near_duplicates(prompts, THRESHOLD)]


def minhash(prompts: Sequence[str], checked: bool = False) -> list[int]:
    from datasketch import MinHash, MinHashLSH

    sets = [words(prompt) for prompt in prompts]
    sketches = MinHash.generator(
        ([word.encode() for word in one] for one in sets), num_perm=PERMUTATIONS
    )
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}
    dropped = []
    for position, sketch in enumerate(sketches):
        one = sets[position]
        for other in index.query(sketch):
            if checked:
                similarity = len(one & sets[other]) / len(one | sets[other])
            else:
                similarity = sketch.jaccard(kept[other])
            if similarity >= THRESHOLD:
                dropped.append(position)
                break
        else:
            index.insert(position, sketch)
            kept[position] = None if checked else sketch
    return dropped


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cell(system: str, path: Path) -> None:
    """One run: writes result-0.json."""
    spec = json.loads(path.read_text())
    if system != "exact":
        import datasketch  # noqa: F401  before the clock starts
    prompts = mixtures(read_prompts(spec["tables"]), spec["rows"])
    before, started = peak_mb(), time.process_time()
    dropped = exact(prompts) if system == "exact" else minhash(prompts, system != "minhash")
    result = {"seconds": time.process_time() - started, "megabytes": peak_mb() - before}
    (path.parent / "result-0.json").write_text(json.dumps(result | {"dropped": dropped}))


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Medians and spread of each system, what it finds, and ratios to the exact index."""
    cells: dict[str, Any] = {}
    truth = set(data["runs"].get("exact", [{"dropped": []}])[-1]["dropped"])
    for name, runs in data["runs"].items():
        found = set(runs[-1]["dropped"])
        cells[name] = {
            "seconds": spread([run["seconds"] for run in runs]),
            "megabytes": spread([run["megabytes"] for run in runs]),
            "dropped": len(found),
            "rounds": len(runs),
        }
        if truth:
            cells[name] |= {
                "recall": len(found & truth) / len(truth),
                "precision": len(found & truth) / len(found) if found else 1.0,
            }
    ratios = {
        f"{name}_{what}_vs_exact": cells[name][what]["median"] / cells["exact"][what]["median"]
        for name in SYSTEMS[1:]
        for what in ("seconds", "megabytes")
        if name in cells and "exact" in cells and cells["exact"][what]["median"] > 0
    }
    return {"cells": cells, "ratios": ratios}


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in SYSTEMS:
        cell(sys.argv[1], Path(sys.argv[2]))
        return
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--rows", type=int, default=50_000)
    options.add_argument("--tables", nargs="+", default=[], metavar="FILE:COLUMN")
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    given = options.parse_args()
    spec = {"rows": given.rows, "tables": given.tables}
    data = load(given.json) | spec
    in_turn(
        given.json,
        data,
        given.rounds,
        given.systems,
        lambda system: run_ranks([str(Path(__file__).resolve()), system], spec)[0],
        report,
        lambda run: (
            f"{run['seconds']:8.1f} s  {run['megabytes']:8.0f} MB  {len(run['dropped'])} dropped"
        ),
    )
    for name, one in data["cells"].items():
        if "recall" in one:
            print(f"{name:<60} recall {one['recall']:.4f}, precision {one['precision']:.4f}")
    print_ratios(data)


if __name__ == "__main__":
    main()
