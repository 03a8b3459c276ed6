"""One run of one way to merge, for benchmarks/merge.py: SYSTEM SPEC.json.

Writes result.json: seconds of the work after all imports, the peak resident bytes of this process
(pages of mapped files included), and the bytes that it asked the system to read and to write.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def untaxed(spec: dict[str, Any], *, with_probes: bool = True) -> Callable[[], object]:
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from rich.console import Console
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    from pipeline import artifact as art
    from pipeline import merge
    from pipeline.recipes import MergeRecipe
    from pipeline.stage import Context

    if not with_probes:
        merge._probe = lambda *_: {"parity": 0.0, "rounding": 0.0, "update": 1.0}

    def work() -> object:
        scratch = Path(spec["scratch"])
        inputs = {name: art.open_artifact(Path(spec[name])) for name in ("base", "sft")}
        staging = art.stage_folder(scratch / "merge")
        context = Context(scratch=scratch, console=Console(quiet=True))
        facts = merge.run(MergeRecipe(), inputs, staging, context)
        return art.seal(
            staging,
            scratch / "merge",
            stage="merge",
            stage_version=1,
            key="benchmark",
            recipe={},
            inputs={},
            facts=facts,
            seconds=0.0,
            hashed=context.hashed,
        )

    return work


def peft(spec: dict[str, Any]) -> Callable[[], object]:
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401  (PEFT imports it while it works)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    def work() -> object:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype="auto")
        adapted = PeftModel.from_pretrained(model, spec["adapter"])
        adapted.merge_and_unload().save_pretrained(Path(spec["scratch"]) / "merged")
        return None

    return work


def cp(spec: dict[str, Any]) -> Callable[[], object]:
    command = ["cp", "-r", spec["model"], str(Path(spec["scratch"]) / "copy")]
    return lambda: subprocess.run(command, check=True)


SYSTEMS: dict[str, Callable[[dict[str, Any]], Callable[[], object]]] = {
    "untaxed": untaxed,
    "untaxed_without_probes": lambda spec: untaxed(spec, with_probes=False),
    "peft": peft,
    "cp": cp,
}


def moved() -> dict[str, int]:
    """Bytes so far, of this process and of the children that it waited for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    found = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return {
        "read_bytes": found["rchar"],
        "written_bytes": found["wchar"],
        "written_to_disk_bytes": found["write_bytes"],
    }


def main(system: str, path: Path) -> None:
    spec = json.loads(path.read_text())
    work = SYSTEMS[system](spec)
    before, started = moved(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - started, moved()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    result = {"seconds": seconds, "peak_bytes": peak * 1024}
    result |= {name: after[name] - before[name] for name in after}
    (path.parent / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
