"""Pairs of ranks, forked from one process: collectives until a victim meets its fate.

python fates.py FOLDER PATIENCE writes FOLDER/FATE-VICTIM-RANK.txt (what a rank said) and outcomes.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

from pipeline.errors import DataError, UntaxedError, one_line
from pipeline.sft import leave, leave_for
from pipeline.train.world import DistributedWorld, init_world

FATES = ("killed", "frozen", "hangs", "refuses", "works")
LONGEST = 60.0


def main(folder: Path, patience: float) -> None:
    """Play all fates at once; whoever is left after LONGEST seconds is killed."""
    playing: dict[int, str] = {}
    for fate in FATES:
        for victim in (0, 1):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            for rank in (0, 1):
                name = f"{fate}-{victim}-{rank}"
                child = os.fork()
                if child == 0:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    said = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT)
                    os.dup2(said, 1)
                    os.dup2(said, 2)
                    leave(play(fate, victim, patience, folder))
                playing[child] = name
    outcomes = {}
    give_up = time.monotonic() + LONGEST
    while playing and time.monotonic() < give_up:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            name = playing.pop(child)
            outcomes[name] = {"code": os.waitstatus_to_exitcode(status), "ended": time.time()}
        elif all(is_victim(name) and "works" not in name for name in playing.values()):
            break
        else:
            time.sleep(0.01)
    for child in playing:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def is_victim(name: str) -> bool:
    _, victim, rank = name.split("-")
    return victim == rank


def play(fate: str, victim: int, patience: float, folder: Path) -> int:
    """One rank; returns its exit code."""
    world = init_world(always=False, leave=leave_for)
    assert world is not None
    world.be_patient(patience)
    try:
        with world.blaming():
            for _ in range(3):
                world.barrier()
            if world.rank == victim:
                (folder / f"{fate}-{victim}.met").write_text(str(time.time()))
                meet(fate, patience, world)
            world.barrier()
    except UntaxedError as error:
        print(f"sft: {one_line(error)}", flush=True)
        return error.exit_code
    world.close()
    return 0


def meet(fate: str, patience: float, world: DistributedWorld) -> None:
    """What becomes of the victim."""
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fate == "hangs":
        time.sleep(100 * patience)
    elif fate == "refuses":
        raise DataError(f"rank {world.rank} has seen broken rows")
    else:
        for part in range(8):  # twice as long as others have patience
            time.sleep(patience / 4)
            world.mark(f"part {part}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
