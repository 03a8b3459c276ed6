"""The shell around every stage: argv -> key -> skip | run | seal -> track -> exit code. Torch-free."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from rich.console import Console

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import RecipeError, Stopped, UntaxedError, one_line
from pipeline.graph import Planned, Workspace, plan_job, stages_of
from pipeline.jobfile import load_job
from pipeline.recipes import Execution
from pipeline.recorder import Recorder
from pipeline.tracking import Tracker

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_JOB = ROOT / "jobs" / "quickstart.yaml"
STATUS_FILE = "UNTAXED_STATUS_FILE"
SEALED_FILE = "UNTAXED_SEALED_FILE"
CACHE = "UNTAXED_CACHE"


class World(Protocol):
    """The processes of one stage. Rank 0 decides; the others hear of it by ``broadcast``."""

    rank: int
    size: int

    def broadcast(self, value: Any) -> Any: ...
    def barrier(self) -> None: ...
    def mark(self, at: str) -> None: ...
    def be_patient(self, seconds: float) -> None: ...


class Solo:
    """A world of one process."""

    rank = 0
    size = 1

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        return None

    def mark(self, at: str) -> None:
        return None

    def be_patient(self, seconds: float) -> None:
        return None


@dataclass
class Context:
    """What a stage gets beside recipe, inputs and output folder; nothing of it bears identity.

    ``scratch`` outlives a crash (checkpoints, finished rows) and is removed after sealing.
    ``cache_at`` outlives the run: what can be made again and other runs may use.
    ``hashed``: files of the output that the stage has hashed while it wrote them.
    ``options`` holds the mechanism options of the command line (``ds``, ``engine``).
    """

    scratch: Path
    execution: Execution = Execution()
    world: World = field(default_factory=Solo)
    options: dict[str, Any] = field(default_factory=dict)
    cache_at: Path | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    hashed: dict[str, art.Hashed] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.cache_at or self.scratch / "cache"

    def log(self, message: str) -> None:
        """Say something to the person watching, once, not once a rank."""
        if self.world.rank == 0:
            self.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def metric(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of one step for tracking (rank 0 only)."""
        if self.world.rank == 0:
            self.metrics.append((step, dict(values)))


Run = Callable[[Any, Mapping[str, Artifact], Path, Context], dict[str, Any]]


class Parser(argparse.ArgumentParser):
    """Refuses a wrong command line as a wrong job file is refused: one line and exit code 78."""

    def error(self, message: str) -> NoReturn:
        name = Path(self.prog.partition(" ")[0]).stem
        say_status(RecipeError.exit_code)
        self.exit(RecipeError.exit_code, f"{name}: {' '.join(message.split())}; see --help\n")


def arguments(name: str) -> argparse.ArgumentParser:
    """The frozen command line of the stage scripts."""
    parser = Parser(prog=f"pipeline/{name}.py", allow_abbrev=False)
    parser.add_argument("--job", type=Path, default=DEFAULT_JOB, help="job file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one value"
    )
    parser.add_argument("--rebuild", action="store_true", help="run again, moving the old aside")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of artifacts")
    if name == "sft":
        parser.add_argument("--ds", type=Path, help="DeepSpeed JSON (chooses ZeRO)")
        parser.add_argument("--engine", choices=("fsdp", "ddp", "single"), help="other engines")
        parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(name: str, run: Run, argv: Sequence[str] | None = None, world: World | None = None) -> int:
    """Run one stage from the command line; returns the exit code."""
    options = arguments(name).parse_args(argv)
    code = _guarded(name, run, options, world or Solo())
    if code:
        say_status(code)
    return code


def say_status(code: int) -> None:
    """Tell whoever started the launcher the exit code; the first rank that fails has the say."""
    if STATUS_FILE not in os.environ:
        return
    with contextlib.suppress(FileExistsError):
        with Path(os.environ[STATUS_FILE]).open("x", encoding="utf-8") as stream:
            stream.write(str(code))


def say_sealed(folder: Path) -> None:
    """Tell whoever started the launcher that there is a sealed artifact, and where."""
    if SEALED_FILE in os.environ:
        Path(os.environ[SEALED_FILE]).write_text(str(folder), encoding="utf-8")


def _guarded(name: str, run: Run, options: argparse.Namespace, world: World) -> int:
    """The stage with every failure turned into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it regrets an optional kernel
    try:
        _shell(name, run, options, world)
        return 0
    except UntaxedError as error:
        message = one_line(error).removeprefix(f"{name}: ")
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as error:
        said = one_line(error) if str(error) else "stopped"
        print(f"{name}: {said}; run the same command to go on", file=sys.stderr, flush=True)
        return Stopped.exit_code
    except Exception as error:
        refused = _system_error(error)
        if refused is not None:
            print(f"{name}: {_explain_os(refused, options.runs)}", file=sys.stderr, flush=True)
            return 1
        where = _save_traceback(options.runs, name)
        print(
            f"{name}: unexpected {type(error).__name__}: {one_line(error)[:500]}"
            f" (traceback in {where})",
            file=sys.stderr,
            flush=True,
        )
        return 1


def _stop(signum: int, frame: object) -> None:
    """As Ctrl-C does: libraries catch any Exception. Once: launchers ask again, in the clean-up."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt("stopped by SIGTERM")


def _system_error(error: Exception) -> OSError | None:
    """The system's own refusal, such as a full disk, also where a library wrapped it."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))  # what Rust leaves of it
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _explain_os(error: OSError, runs: Path) -> str:
    place = error.filename or f"writing below {runs}"
    return f"{place}: {error.strerror or error}; free space or fix permissions, then run again"


def _save_traceback(runs: Path, name: str) -> str:
    """Write the traceback beside the artifacts, or where that fails among temporary files."""
    file = f"{name}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.log"
    for folder in (runs / "logs", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(traceback.format_exc(), encoding="utf-8")
            return str(folder / file)
    return "no file: nothing here can be written"


@dataclass
class _Decision:
    """What rank 0 tells the others: skip, run in ``staging``, or fail alike."""

    planned: Planned | None = None
    inputs: dict[str, Artifact] = field(default_factory=dict)
    staging: Path | None = None
    error: UntaxedError | None = None


def _shell(name: str, run: Run, options: argparse.Namespace, world: World) -> None:
    decision = _Decision()
    with contextlib.ExitStack() as held:  # rank 0 keeps its lock until all is sealed or has failed
        if world.rank == 0:
            try:
                decision = _decide(name, options, held)
            except UntaxedError as error:
                decision = _Decision(error=error)
            except OSError as error:
                decision = _Decision(error=UntaxedError(_explain_os(error, options.runs)))
        decision = world.broadcast(decision)
        if decision.error is not None:
            raise decision.error
        assert decision.planned is not None
        if decision.staging is not None:
            _run(name, run, options, world, decision)
        say_sealed(decision.planned.folder)


def _decide(name: str, options: argparse.Namespace, held: contextlib.ExitStack) -> _Decision:
    job = load_job(options.job, tuple(options.set))
    workspace = Workspace(options.runs.resolve())
    if name not in stages_of(job):
        raise RecipeError(
            f"{options.job}: job {job.name} has no {name} stage; wanted one of"
            f" {', '.join(stages_of(job))}: run those, or add a section {name} to the job"
        )
    planned = plan_job(job, workspace, adopt=True)[name]
    inputs = planned.open_inputs()
    if not options.rebuild and planned.sealed_from(inputs):
        return _skip(planned, workspace)
    held.enter_context(art.lock(planned.folder))
    if planned.folder.exists():
        if not options.rebuild and planned.sealed_from(inputs):  # sealed between the two looks
            return _skip(planned, workspace)
        aside = art.move_aside(planned.folder)
        if options.rebuild:
            print(f"{name}: rebuilding; the old one is now {aside.name}", flush=True)
    return _Decision(planned, inputs, art.stage_folder(planned.folder))


def _skip(planned: Planned, workspace: Workspace) -> _Decision:
    print(f"{planned.name}: sealed already ({planned.folder.name})", flush=True)
    Tracker(planned.job, workspace.runs).seen(planned, art.open_artifact(planned.folder))
    return _Decision(planned=planned)


def _run(
    name: str, run: Run, options: argparse.Namespace, world: World, decision: _Decision
) -> None:
    planned, staging = decision.planned, decision.staging
    assert planned is not None and staging is not None
    scratch = planned.folder.parent / f".{planned.folder.name}.scratch"
    scratch.mkdir(exist_ok=True)
    context = Context(
        scratch=scratch,
        execution=planned.job.execution,
        world=world,
        options={"ds": getattr(options, "ds", None), "engine": getattr(options, "engine", None)},
        cache_at=Path(os.environ.get(CACHE) or planned.folder.parent / "cache"),
    )
    # to other stages, forked with mlflow imported, a store that is away costs seconds, not a training
    recorder = Recorder(planned.folder.parent) if name == "sft" and world.rank == 0 else None
    aside = recorder.look if recorder else None
    tracker = Tracker(planned.job, planned.folder.parent, aside) if world.rank == 0 else None
    started = time.monotonic()
    try:
        if tracker:
            tracker.start(planned)
        context.log(f"{name}: {planned.folder.name}")
        facts = run(planned.recipe, decision.inputs, staging, context)
        world.mark("sealing")
        world.barrier()
        if tracker:
            sealed = art.seal(
                staging,
                planned.folder,
                stage=name,
                stage_version=planned.version,
                key=planned.key,
                recipe=planned.recipe.model_dump(mode="json"),
                inputs={k: v.digest for k, v in decision.inputs.items()},
                facts=facts,
                seconds=time.monotonic() - started,
                hashed=context.hashed,
            )
            tracker.finish(planned, sealed, context.metrics)
            shutil.rmtree(scratch, ignore_errors=True)
            print(
                f"{name}: sealed {sealed.folder.name} in {sealed.manifest.seconds:.1f} s",
                flush=True,
            )
        world.barrier()
    except BaseException as error:
        if tracker:
            killed = isinstance(error, Stopped | KeyboardInterrupt)
            tracker.fail(planned, "KILLED" if killed else "FAILED", one_line(error))
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if recorder:
            recorder.close()
