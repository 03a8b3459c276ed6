"""``untaxed``: the console command over the stages. Torch-free."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from pipeline import artifact as art
from pipeline.cluster import commands
from pipeline.errors import DataError, RecipeError, UntaxedError, one_line
from pipeline.graph import Planned, Workspace, plan_job, stages_of
from pipeline.jobfile import apply_set, load_job
from pipeline.launching import ENGINES, engine_of, launch_stage
from pipeline.planning import print_memory
from pipeline.recipes import Geometry, Job
from pipeline.releasing import Releases, told
from pipeline.stage import DEFAULT_JOB, Parser
from pipeline.summary import print_summary, write_summary
from pipeline.tracking import Tracker, store_uri


def parser() -> argparse.ArgumentParser:
    """The command line of ``untaxed``."""
    top = Parser(prog="untaxed", description=__doc__, allow_abbrev=False)
    parsers = top.add_subparsers(dest="command", required=True)
    run = parsers.add_parser("run", help="all stages in order, skipping what is sealed")
    plan = parsers.add_parser("plan", help="what would run and why, without running it")
    doctor_ = parsers.add_parser("doctor", help="what is wrong with the rows, before training")
    report = parsers.add_parser("report", help="one report over finished jobs, side by side")
    verify = parsers.add_parser("verify", help="re-hash every file of all sealed artifacts")
    remote = [
        parsers.add_parser("launch", help="all stages on a Kubernetes cluster, watched"),
        parsers.add_parser("status", help="how far a launched job is"),
        parsers.add_parser("logs", help="what a launched job prints"),
        parsers.add_parser("cancel", help="stop a launched job; it saves its place"),
    ]
    for command in remote:
        commands.add_options(command)
    remote[0].add_argument("--dry-run", action="store_true", help="print the objects, make none")
    remote[0].add_argument(
        "--jobset", action="store_true", help="one JobSet, which needs no launcher; not watched"
    )
    remote[0].add_argument("--again", action="store_true", help="also what has failed before")
    remote[2].add_argument("--follow", action="store_true", help="until the stage ends")
    promote = parsers.add_parser("promote", help="release a model whose gate passed")
    rollback = parsers.add_parser("rollback", help="release again what was released before")
    lineage = parsers.add_parser("lineage", help="whence a registered model comes")
    track_ = parsers.add_parser("track", help="send what a tracking server has not heard yet")
    where_ = parsers.add_parser("where", help="the folder of a sealed stage, or of the base")
    where_.add_argument("stage", help="base, or the name of a stage")
    for command in (run, plan, doctor_, report, where_, track_):
        command.add_argument(
            "--job", type=Path, action="append", help="job file; several are compared in one report"
        )
        command.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    for command in (run, plan, doctor_, report, where_, track_, verify, promote, rollback, lineage):
        command.add_argument("--runs", type=Path, default=Path("runs"), help="artifacts folder")
    plan.add_argument("--engine", choices=ENGINES, help="default: zero3 on several processes")
    plan.add_argument("--world-size", type=int, default=1, help="processes of the sft stage")
    plan.add_argument("--ranks-per-machine", type=int, help="default: at most 8")
    plan.add_argument("--device", default="cpu", help="cpu (this machine), h100-80g, a100-40g, ...")
    plan.add_argument("--device-gb", type=float, help="memory of another device, in 10^9 bytes")
    doctor_.add_argument("--samples", type=int, default=2, help="rows of each source to show")
    doctor_.add_argument(
        "--image", action="store_true", help="the container this runs in, and no job"
    )
    doctor_.set_defaults(rebuild=False)
    report.add_argument(
        "--compare",
        dest="job",
        type=Path,
        action="extend",
        nargs="+",
        metavar="JOB",
        help="several --job at once",
    )
    report.add_argument("--out", type=Path, help="folder to write it into; default: that of --runs")
    promote.add_argument("model", help="NAME (its candidate), NAME@ALIAS or NAME/VERSION")
    rollback.add_argument("model", metavar="name", help="NAME")
    lineage.add_argument("model", help="NAME (what is released), NAME@ALIAS or NAME/VERSION")
    lineage.add_argument("--json", action="store_true", help="for programs")
    for command in (promote, rollback):
        command.add_argument("--override", action="store_true", help="without a passed gate")
        command.add_argument("--why", help="the reason, which is recorded; goes with --override")
    run.add_argument("--nproc", type=int, default=1, help="processes of the sft stage")
    run.add_argument("--engine", choices=ENGINES, help="default: zero3 on several processes")
    run.add_argument("--rebuild", action="store_true", help="run every stage again")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        return COMMANDS[options.command](options)
    except UntaxedError as error:
        print(f"untaxed: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("untaxed: stopped; run the same command to go on", file=sys.stderr)
        return 143
    except OSError as error:
        place = error.filename or "file system"
        print(f"untaxed: {place}: {error.strerror or error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _jobs(options: argparse.Namespace) -> list[tuple[Path, Job]]:
    paths = options.job or [DEFAULT_JOB]
    jobs = [(path, load_job(path, tuple(options.set))) for path in paths]
    names = [job.name for _, job in jobs]
    if len(set(names)) != len(names):
        raise DataError(f"--job: two jobs of one name ({', '.join(names)}); rename one")
    return jobs


def run(options: argparse.Namespace) -> int:
    """Run the stages of all jobs that are not sealed yet, then write the report."""
    engine_of(options)
    console = Console(stderr=True)
    workspace = Workspace(options.runs.resolve())
    jobs = _jobs(options)
    ran: set[Path] = set()
    for path, job in jobs:
        console.rule(f"[bold]{job.name}[/]  {path}")
        names = stages_of(job)
        for number, name in enumerate(names, start=1):
            planned = plan_job(job, workspace, adopt=False)[name]
            again = options.rebuild and planned.folder not in ran
            if planned.state() == "sealed" and not again:
                console.print(
                    f"[{number}/{len(names)}] {name}: sealed ({planned.folder.name})", markup=False
                )
                Tracker(job, workspace.runs).seen(planned, art.open_artifact(planned.folder))
                continue
            console.print(f"[{number}/{len(names)}] {name}: {planned.state()}", markup=False)
            code = launch_stage(name, path, options)
            if code:
                print(f"untaxed: {job.name}: stage {name} failed (exit {code})", file=sys.stderr)
                return code
            ran.add(plan_job(job, workspace, adopt=False)[name].folder)
    _summarise([job for _, job in jobs], workspace, workspace.runs)
    return 0


def report(options: argparse.Namespace) -> int:
    """One report over jobs that are finished; runs nothing."""
    workspace = Workspace(options.runs.resolve())
    out = options.out.resolve() if options.out else workspace.runs
    if out.exists() and not out.is_dir():
        raise RecipeError(f"--out {options.out}: is a file; wanted a folder")
    jobs = _jobs(options)
    for path, job in jobs:
        for planned in plan_job(job, workspace, adopt=False).values():
            state = planned.state()
            if state != "sealed":
                raise DataError(
                    f"{path}: {job.name} is not finished in {options.runs}: {planned.name} {state};"
                    f" untaxed run --job {path} first"
                )
    _summarise([job for _, job in jobs], workspace, out)
    return 0


def _summarise(jobs: list[Job], workspace: Workspace, out: Path) -> None:
    print_summary(write_summary(jobs, workspace, out), workspace, out, Console())


def plan(options: argparse.Namespace) -> int:
    """Print stages, keys and states, shapes, memory and advice; writes nothing."""
    from pipeline.model.geometry import plan_facts

    console = Console()
    workspace = Workspace(options.runs.resolve())
    for path, job in _jobs(options):
        table = Table(title=f"{job.name} ({path})", title_justify="left")
        for column in ("stage", "key", "state"):
            table.add_column(column, overflow="fold")
        for planned in plan_job(job, workspace, adopt=False).values():
            table.add_row(planned.name, planned.key or "-", _why(planned))
        console.print(table)
        for name, value in plan_facts(job, _shapes(job, workspace)).items():
            text = f"{value:,}" if isinstance(value, int) else value
            console.print(f"  {name.replace('_', ' ')}: {text}", highlight=False)
        print_memory(job, workspace, options, console)
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Read what the jobs would train on; exit code 65 when a rule is broken."""
    if options.image:
        from pipeline import image

        return image.doctor(Console())
    from pipeline.doctor import doctor as examine_jobs

    return examine_jobs(options, _jobs(options))


def _shapes(job: Job, workspace: Workspace) -> Geometry | None:
    """Shapes of the base where it is adopted and of a known architecture."""
    from pipeline.model.base import find_base
    from pipeline.model.geometry import geometry_of

    base = find_base(job.base, workspace)
    if base is None:
        return None
    try:
        return geometry_of(json.loads(base.path("config.json").read_text(encoding="utf-8")))
    except DataError:
        return None


def _why(planned: Planned) -> str:
    state = planned.state()
    if state != "sealed":
        return state
    return f"sealed {art.open_artifact(planned.folder).manifest.created_at}"


def where(options: argparse.Namespace) -> int:
    """Print the folder of one stage's sealed artifact, or of the adopted base."""
    from pipeline.model.base import find_base

    workspace = Workspace(options.runs.resolve())
    for path, job in _jobs(options):
        if options.stage == "base":
            base = find_base(job.base, workspace)
            folder, state = (base.folder, "sealed") if base else (None, "not adopted yet")
        elif options.stage in stages_of(job):
            planned = plan_job(job, workspace, adopt=False)[options.stage]
            folder, state = planned.folder, planned.state()
        else:
            raise RecipeError(
                f"{options.stage}: {job.name} has no such stage; wanted one of base,"
                f" {', '.join(stages_of(job))}"
            )
        if folder is None or state != "sealed":
            first = "prep" if options.stage == "base" else options.stage
            raise DataError(f"{path}: {options.stage}: {state}; run {first} first")
        print(folder)
    return 0


def track(options: argparse.Namespace) -> int:
    """Record what waits below ``--runs``, of whatever job."""
    runs = options.runs.resolve()
    left = Tracker(_jobs(options)[0][1], runs).send()
    if left:
        raise UntaxedError(f"{store_uri(runs)}: {left} events still wait; run this command again")
    print("tracking: nothing waits")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Re-hash all artifacts below ``--runs``."""
    folders = sorted(path.parent for path in options.runs.glob("*/" + art.MANIFEST))
    if not folders:
        raise DataError(f"{options.runs}: no sealed artifact below this folder")
    for folder in folders:
        print(f"{folder.name}: {art.verify(folder)} files as sealed")
    return 0


def _releases(options: argparse.Namespace) -> Releases:
    from pipeline.tracking import connect

    try:
        return Releases(connect(options.runs.resolve()).client)
    except Exception as error:  # of many kinds, by what kind of store it is
        raise UntaxedError(f"{store_uri(options.runs)}: {one_line(error)[:300]}") from error


def _why_override(options: argparse.Namespace) -> str | None:
    """The reason for a release without a passed gate; RecipeError for one half of it."""
    why = (options.why or "").strip()
    if options.override != bool(why):
        raise RecipeError("--override and --why REASON go together: what is overridden is recorded")
    return why or None


def promote(options: argparse.Namespace) -> int:
    """Release a registered model."""
    why = _why_override(options)
    print(_releases(options).promote(options.model, why))
    return 0


def rollback(options: argparse.Namespace) -> int:
    """Release what was released before."""
    why = _why_override(options)
    print(_releases(options).rollback(options.model, why))
    return 0


def lineage(options: argparse.Namespace) -> int:
    """Rows, code, image and gate of a registered model."""
    found = _releases(options).lineage(options.model)
    print(json.dumps(found, indent=1) if options.json else "\n".join(told(found)))
    return 0


def cluster(options: argparse.Namespace) -> int:
    """The commands on a Kubernetes cluster."""
    job = load_job(options.job, tuple(options.set))
    text = options.job.read_text(encoding="utf-8")
    if options.set:
        tree = yaml.safe_load(text)
        for assignment in options.set:
            apply_set(tree, assignment)
        text = yaml.safe_dump(tree, sort_keys=False)
    return getattr(commands, str(options.command))(options, job, text)  # type: ignore[no-any-return]


COMMANDS = {
    "launch": cluster,
    "status": cluster,
    "logs": cluster,
    "cancel": cluster,
    "run": run,
    "plan": plan,
    "doctor": doctor,
    "report": report,
    "where": where,
    "track": track,
    "verify": verify,
    "promote": promote,
    "rollback": rollback,
    "lineage": lineage,
}


if __name__ == "__main__":
    sys.exit(main())
