"""The first process of a container: exit codes, stops, and what launchers would hide. Real processes;
small scripts stand in for the ranks of a stage."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from parts import ROOT

from pipeline.cluster.words import NO_MEMORY, SIGKILL
from pipeline.errors import DataError, RecipeError, Stopped
from pipeline.stage import SEALED_FILE, STATUS_FILE

ENTRYPOINT = ROOT / "docker" / "entrypoint.py"
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "--master-port", "0")
HEAD = "import os, pathlib, signal, sys, time\nhere = pathlib.Path(__file__).parent\n"
SEAL = f"""
(here / 'manifest.json').touch()
pathlib.Path(os.environ[{SEALED_FILE!r}]).write_text(str(here))
"""
SAY = f"pathlib.Path(os.environ[{STATUS_FILE!r}]).write_text(str({{code}}))\n"
SAVE = f"""
def stop(*_):
    time.sleep({{seconds}})
    (here / (os.environ.get('RANK', '0') + '.saved')).touch()
    {SAY.format(code=Stopped.exit_code).strip()}
    sys.exit({Stopped.exit_code})
signal.signal(signal.SIGTERM, stop)
(here / (os.environ.get('RANK', '0') + '.up')).touch()
time.sleep(60)
"""


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("entrypoint", ENTRYPOINT)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def stage(folder: Path, text: str) -> Path:
    """A stage script where an image has them; it prints and writes what ``text`` says."""
    (folder / "pipeline").mkdir()
    path = folder / "pipeline" / "stage.py"
    path.write_text(HEAD + text, encoding="ascii")
    return path


def start(folder: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more
    return subprocess.Popen(
        [sys.executable, str(ENTRYPOINT), *command],
        cwd=folder,
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(folder: Path, *command: str) -> tuple[int, str]:
    with start(folder, *command) as child:
        _, errors = child.communicate(timeout=120)
    return child.returncode, errors


def wait_for(folder: Path, pattern: str, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(folder.rglob(pattern))) < count:
        assert time.monotonic() < until, f"no {pattern} in a minute"
        time.sleep(0.05)


def test_constants_are_those_of_the_pipeline(module: ModuleType) -> None:
    assert (module.STATUS_FILE, module.SEALED_FILE) == (STATUS_FILE, SEALED_FILE)
    assert (RecipeError.exit_code, Stopped.exit_code) == (module.BAD_RECIPE, module.STOPPED)
    assert (NO_MEMORY, SIGKILL) == (module.NO_MEMORY, module.KILLED)


@pytest.mark.parametrize(
    ("texts", "killed"),
    [
        (["low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\n"], 2),
        (["oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"], 1),
        (["oom_kill_disable 0\nunder_oom 0\n"], 0),
        (["not two words a line\n", "oom_kill 4\n"], 4),
        ([], 0),
    ],
)
def test_the_kernel_is_asked_how_many_it_killed(
    module: ModuleType, tmp_path: Path, texts: list[str], killed: int
) -> None:
    """Control groups of version 2 and 1, an older kernel, a file that is something else, none."""
    files = [tmp_path / str(number) for number in range(max(1, len(texts)))]
    for file, text in zip(files, texts, strict=False):
        file.write_text(text)
    assert module.killed_for_memory(files) == killed


@pytest.mark.parametrize("code", [0, 1, RecipeError.exit_code, DataError.exit_code])
def test_another_command_keeps_its_exit_code(tmp_path: Path, code: int) -> None:
    assert ended(tmp_path, sys.executable, "-c", f"raise SystemExit({code})")[0] == code


def test_another_command_is_the_first_process_itself(tmp_path: Path) -> None:
    """It hears SIGTERM because nothing stands between it and the container's runtime."""
    child = start(tmp_path, sys.executable, "-c", "import os; print(os.getpid())")
    output, _ = child.communicate(timeout=60)
    assert int(output) == child.pid


def test_a_command_that_cannot_start_is_named(tmp_path: Path) -> None:
    assert ended(tmp_path)[0] == 64
    for words in (["no-such-command"], ["no-such-command", "pipeline/stage.py"]):
        code, errors = ended(tmp_path, *words)
        assert code == 127 and "no-such-command" in errors


def test_what_is_sealed_is_a_success(tmp_path: Path) -> None:
    stage(tmp_path, SEAL)
    assert ended(tmp_path, sys.executable, "pipeline/stage.py") == (0, "")


def test_an_end_without_a_seal_is_none(tmp_path: Path) -> None:
    stage(tmp_path, f"pathlib.Path(os.environ[{SEALED_FILE!r}]).write_text(str(here))\n")
    code, errors = ended(tmp_path, sys.executable, "pipeline/stage.py")
    assert code == 1 and "sealed nothing" in errors


@pytest.mark.parametrize("code", [1, RecipeError.exit_code, DataError.exit_code])
def test_what_a_rank_says_counts_and_not_its_launcher(tmp_path: Path, code: int) -> None:
    stage(tmp_path, SAY.format(code=code) + "sys.exit(3)\n")
    assert ended(tmp_path, sys.executable, "pipeline/stage.py")[0] == code


def test_a_stage_that_dies_without_a_word_failed(tmp_path: Path) -> None:
    stage(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)\n")
    assert ended(tmp_path, sys.executable, "pipeline/stage.py")[0] == 1


def test_a_stop_waits_until_the_place_is_saved(tmp_path: Path) -> None:
    stage(tmp_path, SAVE.format(seconds=0.5))
    child = start(tmp_path, sys.executable, "pipeline/stage.py")
    wait_for(tmp_path, "*.up", 1)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == Stopped.exit_code
    assert list(tmp_path.rglob("*.saved"))


def test_a_stop_that_takes_too_long_ends_all_the_same(tmp_path: Path) -> None:
    stage(tmp_path, SAVE.format(seconds=50))
    child = start(tmp_path, sys.executable, "pipeline/stage.py", UNTAXED_GRACE_SECONDS="0.5")
    wait_for(tmp_path, "*.up", 1)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=20)
    assert child.returncode == Stopped.exit_code
    assert not list(tmp_path.rglob("*.saved"))


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    """deepspeed ends with 0 where its helper was killed; its ranks are stopped, and it failed."""
    stage(tmp_path, SAVE.format(seconds=0))
    (tmp_path / "launcher.py").write_text(
        "import subprocess, sys, pathlib, time\n"
        "subprocess.Popen([sys.executable, sys.argv[1]])\n"
        "while not list(pathlib.Path('pipeline').glob('*.up')): time.sleep(0.05)\n"
    )
    code, errors = ended(tmp_path, sys.executable, "launcher.py", "pipeline/stage.py")
    assert code == 1 and "the launcher ended (0) before its ranks" in errors
    assert list(tmp_path.rglob("*.saved")), "they were asked, not killed"


@pytest.mark.distributed
def test_torchrun_ends_with_the_code_of_its_ranks(tmp_path: Path) -> None:
    stage(tmp_path, SAY.format(code=RecipeError.exit_code) + "sys.exit(78)\n")
    assert ended(tmp_path, *TORCHRUN, "pipeline/stage.py")[0] == RecipeError.exit_code


@pytest.mark.distributed
def test_torchrun_passes_a_stop_on(tmp_path: Path) -> None:
    stage(tmp_path, SAVE.format(seconds=0.5))
    child = start(tmp_path, *TORCHRUN, "pipeline/stage.py")
    wait_for(tmp_path, "*.up", 2)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == Stopped.exit_code
    assert len(list(tmp_path.rglob("*.saved"))) == 2


DEEPSPEED = ["deepspeed", "pipeline/sft.py", "--ds", "x.json"]
NODES = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_MASTER_ADDR": "job-0.job"}


def test_deepspeed_in_one_pod_gets_its_count_of_ranks(module: ModuleType, tmp_path: Path) -> None:
    made = module.with_nodes(DEEPSPEED, {"PET_NPROC_PER_NODE": "4"}, tmp_path)
    assert made == ["deepspeed", "--num_accelerators", "4", *DEEPSPEED[1:]]
    stated = ["deepspeed", "--num_accelerators", "2", *DEEPSPEED[1:]]
    assert module.with_nodes(stated, {"PET_NPROC_PER_NODE": "4"}, tmp_path) == stated
    assert module.with_nodes(DEEPSPEED, {}, tmp_path) == DEEPSPEED
    for other in (["torchrun", "pipeline/sft.py"], ["python", "pipeline/prep.py"]):
        assert module.with_nodes(other, NODES, tmp_path) == other


def test_deepspeed_in_several_pods_needs_no_ssh(module: ModuleType, tmp_path: Path) -> None:
    for said in (
        {"JOB_COMPLETION_INDEX": "1"},
        {"PET_NODE_RANK": "1", "JOB_COMPLETION_INDEX": "7"},
    ):
        made = module.with_nodes(DEEPSPEED, NODES | said, tmp_path)
        options = dict(itertools.pairwise(made))
        assert Path(options["--hostfile"]).read_text() == "node-0 slots=4\nnode-1 slots=4\n"
        assert "--no_ssh" in made and options["--node_rank"] == "1"
        assert options["--master_addr"] == "job-0.job" and options["--master_port"] == "29500"
        assert made[-3:] == DEEPSPEED[1:]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (NODES | {"PET_NNODES": "two"}, "PET_NNODES='two': wanted a whole number"),
        (NODES | {"PET_NODE_RANK": "2"}, "PET_NODE_RANK=2: wanted less than PET_NNODES=2"),
        (NODES | {"PET_NPROC_PER_NODE": "0"}, "PET_NNODES=2 and no PET_NPROC_PER_NODE"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2 and no PET_MASTER_ADDR; set it in the manifest"),
    ],
)
def test_nodes_that_cannot_be_are_a_bad_recipe(
    module: ModuleType,
    said: dict[str, str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert module.main(DEEPSPEED) == RecipeError.exit_code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("image", "launched", "said"),
    [
        ("a" * 40, "a" * 40, ""),
        ("a" * 40, None, ""),
        ("a" * 40 + "-dirty", None, ""),
        (
            "a" * 40,
            "b" * 40,
            "other code: an image of aaaaaaaaaaaa runs, launched from bbbbbbbbbbbb; build and push"
            " the image under a new tag, and name that in the overlay; or launch from the checkout",
        ),
        ("unknown", "b" * 40, "other code: an image of unknown revision runs, launched from bbbb"),
        (None, "b" * 40, "other code: an image of unknown revision runs"),
        (
            "a" * 40,
            "a" * 40 + "-dirty",
            "other code: an image of aaaaaaaaaaaa runs, launched from aaaaaaaaaaaa with uncommitted"
            " changes, not known to be the same; commit, build and push the image under a new tag",
        ),
        (
            "a" * 40 + "-dirty",
            "a" * 40,
            "other code: an image of aaaaaaaaaaaa with uncommitted changes runs, launched from"
            " aaaaaaaaaaaa, not known to be the same; commit, ",
        ),
        (
            "a" * 40 + "-dirty",
            "a" * 40 + "-dirty",
            "other code: an image of aaaaaaaaaaaa with uncommitted changes runs, launched from"
            " aaaaaaaaaaaa with uncommitted changes, not known to be the same; commit, ",
        ),
        (
            "a" * 40 + "-dirty",
            "b" * 40,
            "other code: an image of aaaaaaaaaaaa with uncommitted changes runs, launched from"
            " bbbbbbbbbbbb; commit, ",
        ),
    ],
)
def test_an_image_of_other_code_says_so(
    module: ModuleType, image: str | None, launched: str | None, said: str
) -> None:
    found = {module.REVISION: image, module.LAUNCHED: launched}
    told = module.other_code({name: value for name, value in found.items() if value})
    assert told.startswith(said) if said else told == ""


def test_other_code_is_told_first(module: ModuleType, tmp_path: Path) -> None:
    stage(tmp_path, SEAL)
    revisions = {module.REVISION: "a" * 40, module.LAUNCHED: "b" * 40}
    child = start(tmp_path, sys.executable, "pipeline/stage.py", **revisions)
    (line,) = child.communicate(timeout=60)[1].splitlines()
    assert child.returncode == 0
    assert line.startswith("entrypoint: other code: an image of aaaaaaaaaaaa runs")


def test_other_code_is_told_with_the_last_words(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, sealed = tmp_path / "words", tmp_path / "sft-1"
    monkeypatch.setattr(module, "LAST_WORDS", words)
    monkeypatch.setenv(module.REVISION, "a" * 40)
    monkeypatch.setenv(module.LAUNCHED, "b" * 40)
    sealed.mkdir()
    (sealed / "manifest.json").touch()
    ended = module.Stage([], tmp_path)
    ended.sealed.write_text(str(sealed))
    assert ended.told(0) == 0
    assert words.read_text().startswith("sealed sft-1; other code: an image of aaaa")


def test_launcher_and_entry_point_agree_on_names(module: ModuleType) -> None:
    from pipeline.cluster import launch, objects

    assert module.LAUNCHED == objects.LAUNCHED
    told = module.other_code({module.REVISION: "a", module.LAUNCHED: "b"})
    assert told.startswith(launch.OTHER_CODE)
