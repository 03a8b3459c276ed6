"""Runs sft.run for several engines in one group of two processes: python worker.py SPEC.json

What all of it needs is imported once, and the ranks are forked from that: a launcher and two ranks
would import it three times over.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from rich.console import Console

from pipeline import artifact as art
from pipeline import sft
from pipeline.recipes import SftRecipe
from pipeline.stage import Context
from pipeline.train.engine import load_deepspeed
from pipeline.train.world import init_world

RANKS = 2


def main(spec: Path) -> int:
    """Fork the ranks and wait for them: 0 if all of them came to their end, else 1."""
    load_deepspeed()
    assert "mlflow" not in sys.modules, "every rank would import it for nothing"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(RANKS):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                train(spec)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sft.leave(code)
    ended = [os.wait()[1] for _ in range(RANKS)]
    return int(any(ended))


def train(spec: Path) -> None:
    torch.set_num_threads(1)
    world = init_world(always=True, leave=sft.leave_for)
    assert world is not None
    for run in json.loads(spec.read_text()):
        inputs = {name: art.open_artifact(Path(folder)) for name, folder in run["inputs"].items()}
        out = Path(run["out"])
        scratch = Path(run.get("scratch", out / "scratch"))
        world.barrier()  # the run before has ended on both
        if world.rank == 0:
            if "copy_of" in run:
                shutil.copytree(run["copy_of"], scratch)
            scratch.mkdir(parents=True, exist_ok=True)
            out.mkdir(parents=True, exist_ok=True)
        world.barrier()
        context = Context(
            scratch=scratch,
            world=world,
            options={"ds": run.get("ds") and Path(run["ds"]), "engine": run.get("engine")},
            console=Console(quiet=True),
        )
        recipe = SftRecipe.model_validate(run["recipe"])
        if "stop_at" in run:
            with asked_to_stop(world, run["stop_at"]):
                sft.run(recipe, inputs, out, context)
            continue
        if "poisoned" in run:
            poisoned(partial(sft.run, recipe, inputs, out, context), run["poisoned"], out)
            continue
        facts = sft.run(recipe, inputs, out, context)
        if world.rank == 0:
            (out / "facts.json").write_text(json.dumps(facts))
    world.close()


@contextlib.contextmanager
def asked_to_stop(world: Any, place: str) -> Iterator[None]:
    """Rank 1 alone gets SIGTERM when it comes to ``place``, such as "step 7"."""
    from pipeline.errors import Stopped

    def mark(at: str) -> None:
        if at == place and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    world.mark = mark
    try:
        yield
        raise AssertionError(f"it was not stopped at {place}")
    except Stopped:
        pass
    finally:
        del world.mark


def poisoned(train: Callable[[], Any], factor: float, out: Path) -> None:
    """Train with the loss of step 3 multiplied by ``factor`` before backward. Leaves error.txt, and a
    file ``unchanged`` if the weights are those after step 2."""
    from pipeline.errors import UntaxedError

    made: list[Any] = []
    states: list[dict[str, torch.Tensor]] = []
    real = sft.make_engine

    def make(*arguments: Any) -> Any:
        engine = real(*arguments)
        backward, step = engine.backward, engine.step

        def poisoning(loss: torch.Tensor) -> None:
            backward(loss * factor if len(states) == 2 else loss)

        def stepping(learning_rate: float) -> float:
            norm = step(learning_rate)
            if len(states) < 2:
                states.append(engine.trainable_state())
            return norm

        engine.backward, engine.step = poisoning, stepping
        made.append(engine)
        return engine

    sft.make_engine = make
    try:
        train()
    except UntaxedError as error:
        now = made[0].trainable_state()
        if torch.distributed.get_rank() == 0:
            (out / "error.txt").write_text(str(error))
            if all(torch.equal(now[name], states[1][name]) for name in now):
                (out / "unchanged").touch()
    finally:
        sft.make_engine = real


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
