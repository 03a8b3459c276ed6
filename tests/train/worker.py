"""Runs sft.run for several engines in one group of processes: torchrun worker.py SPEC.json"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main(spec_path: str) -> None:
    import torch

    torch.set_num_threads(1)
    from rich.console import Console

    from pipeline import artifact as art
    from pipeline import sft
    from pipeline.recipes import SftRecipe
    from pipeline.stage import Context
    from pipeline.train.world import init_world

    spec = json.loads(Path(spec_path).read_text())
    inputs = {name: art.open_artifact(Path(folder)) for name, folder in spec["inputs"].items()}
    world = init_world(always=True, leave=sft.leave_for)
    assert world is not None
    for run in spec["runs"]:
        out = Path(run["out"])
        scratch = Path(run.get("scratch", out / "scratch"))
        if world.rank == 0:
            scratch.mkdir(parents=True, exist_ok=True)
        world.barrier()
        context = Context(
            scratch=scratch,
            world=world,
            options={"ds": run.get("ds") and Path(run["ds"]), "engine": run.get("engine")},
            console=Console(quiet=True),
        )
        facts = sft.run(SftRecipe.model_validate(run["recipe"]), inputs, out, context)
        if world.rank == 0:
            (out / "facts.json").write_text(json.dumps(facts))
    world.close()


if __name__ == "__main__":
    from pipeline.sft import leave

    main(sys.argv[1])
    leave(0)
