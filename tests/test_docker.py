"""The image: what its file says and what its context holds.

The image itself is built by hand (docs/cluster.md says how, and what was seen).
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
ENTRYPOINT = ROOT / "docker" / "entrypoint.py"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments), continued lines joined and comments left out."""
    lines = DOCKERFILE.read_text(encoding="ascii").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", text)
    found = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, _, arguments in found]


def stages() -> dict[str, list[tuple[str, str]]]:
    made: dict[str, list[tuple[str, str]]] = {"": []}
    for name, arguments in instructions():
        if name == "FROM":
            made[arguments.split()[-1]] = []
        made[list(made)[-1]].append((name, arguments))
    return made


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps ``path`` out of the context: the last pattern that fits decides."""
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="ascii").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        loose = pattern.removeprefix("**/")
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, loose) for name in names):
            out = not line.startswith("!")
    return out


def copied(stage: str) -> list[tuple[list[str], str]]:
    """(sources in the context, destination) of the COPY lines of a stage."""
    lines = [arguments.split() for name, arguments in stages()[stage] if name == "COPY"]
    return [(words[:-1], words[-1]) for words in lines if not words[0].startswith("--from")]


def test_the_targets_and_their_default() -> None:
    names = list(stages())
    assert names[-1] == "cpu", "without --target the last stage is built"
    for target in ("cpu", "gpu"):
        origin, *others = stages()[target]
        assert origin[1] == f"runtime AS {target}"
        copies = [arguments for name, arguments in others if name == "COPY"]
        packages, source = copies
        assert packages == f"--from=build-{target} /opt/venv /opt/venv", "no build tool comes along"
        assert source == "--from=source /opt/untaxed /opt/untaxed"
    assert stages()["cpu"][2:] == stages()["gpu"][2:]


def test_builders_without_extensions_can_read_it() -> None:
    text = DOCKERFILE.read_text(encoding="ascii")
    assert "# syntax=" not in text and "<<" not in text and "--link" not in text


def test_it_runs_as_nobody_with_a_number() -> None:
    runtime = dict(stages()["runtime"])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", runtime["USER"]), "runAsNonRoot wants a number"
    first = json.loads(runtime["ENTRYPOINT"])[1]
    assert Path(first).relative_to("/opt/untaxed") == ENTRYPOINT.relative_to(ROOT)
    assert runtime["ENV"] == "UNTAXED_DATA=/data"
    assert dict(stages()["cpu"])["ENV"] == "UNTAXED_REVISION=${REVISION}"


def test_all_that_is_written_lies_below_one_folder() -> None:
    env = dict(re.findall(r"(\w+)=(\S+)", dict(stages()["base"])["ENV"]))
    places = {k: v for k, v in env.items() if k.endswith(("HOME", "DIR"))}
    assert {"HOME", "TMPDIR", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"} <= set(places)
    assert {"TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR"} <= set(places)
    for place in places.values():
        assert place == "/tmp" or place.startswith("/tmp/")


def test_every_argument_is_used_and_every_install_is_locked() -> None:
    text = "\n".join(" ".join(i) for i in instructions())
    pip_reads = {"PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"}
    for name, arguments in instructions():
        if name == "ARG":
            argument = arguments.partition("=")[0]
            assert argument in pip_reads or f"${{{argument}}}" in text, argument
    installs = re.findall(r"pip install ([^;&\n]*)", text)
    assert len(installs) == 9
    own = {".", '"${FLASH_ATTN_WHEEL}"', "docker/requirements.txt"}
    for install in installs:
        packages = [word for word in install.split() if not word.startswith("--")]
        pinned = all("==" in word or word in own for word in packages)
        assert "--constraint constraints.txt" in install or pinned, install
        assert "--requirement" not in install or "--require-hashes" in install
    assert '*"#sha256="*' in text, "a wheel by URL comes with its digest"


def test_every_dependency_has_one_locked_version() -> None:
    import configparser

    lines = (ROOT / "constraints.txt").read_text(encoding="ascii").split()
    locked = {canonicalize_name(line.partition("==")[0]): line for line in lines}
    assert len(locked) == len(lines) and all("==" in line for line in lines)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = config["options"]["install_requires"].split("\n")
    wanted.append("bitsandbytes")  # what the gpu target installs besides
    for requirement in map(Requirement, filter(None, wanted)):
        version = locked[canonicalize_name(requirement.name)].partition("==")[2]
        assert requirement.specifier.contains(version), requirement


def test_what_is_installed_by_digest_is_what_is_locked() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="ascii").split()
    lines += re.findall(r"setuptools==\S+", DOCKERFILE.read_text(encoding="ascii"))
    locked = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines)}
    text = (ROOT / "docker" / "requirements.txt").read_text(encoding="ascii")
    blocks = re.split(r"\n(?=[a-z0-9])", text.split("\n", 4)[4])
    for block in blocks:
        name, _, rest = block.partition("==")
        assert locked[canonicalize_name(name)] == rest.split()[0], name
        assert "--hash=sha256:" in rest, name
    assert len(blocks) > 100


def test_a_build_is_told_what_pip_is_told_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docker"))
    import pip_here

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    (tmp_path / "index" / "simple").mkdir(parents=True)
    lines = [
        "global.cert='/ca.pem'",
        "global.constraint='/elsewhere.txt'",
        f"global.extra-index-url='https://mirror.example/simple file://{tmp_path}/index/simple'",
        f":env:.find-links='{wheels}'",
    ]
    file = tmp_path / "pip.conf"
    assert pip_here.options(pip_here.settings(lines), file) == [
        f"--secret=id=pip,src={file}",
        f"--volume={tmp_path}/index:{tmp_path}/index:ro",
        f"--volume={wheels}:{wheels}:ro",
        "--secret=id=ca,src=/ca.pem",
        "--build-arg=TORCH_INDEX_URL=",
    ]
    assert file.read_text() == (
        f"[global]\nfind-links = {wheels}\n"
        f"extra-index-url = https://mirror.example/simple file://{tmp_path}/index/simple\n"
    )


@pytest.mark.parametrize(
    ("changed", "mark"),
    [("README.md", "-dirty"), ("docker/Dockerfile", "-dirty"), ("left-out.txt", ""), (None, "")],
)
def test_the_revision_of_a_build_says_of_changes(
    tmp_path: Path, changed: str | None, mark: str
) -> None:
    """In what goes into the image; a builder that prints its words stands in for a real one."""
    builder, tree = tmp_path / "bin" / "docker", tmp_path / "tree"
    for file in ("docker/build.sh", "docker/Dockerfile", ".dockerignore", "pipeline/__init__.py"):
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    (tree / "README.md").touch()
    (tree / "left-out.txt").touch()
    builder.parent.mkdir()
    builder.write_text('#!/bin/sh\necho "$@"\n')
    builder.chmod(0o755)
    env = os.environ | {"PATH": f"{builder.parent}:{os.environ['PATH']}", "BUILDER": "docker"}

    def told(*words: str) -> str:
        done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    assert "--build-arg REVISION=unknown " in told("sh", "docker/build.sh")
    told("git", "init", "--quiet")
    told("git", "add", ".")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    told("git", *who, "commit", "--quiet", "--message", "all")
    if changed:
        (tree / changed).write_text("changed")
    commit = told("git", "rev-parse", "HEAD").strip()
    assert f"--build-arg REVISION={commit}{mark} " in told("sh", "docker/build.sh")


def test_labels_are_those_of_oci() -> None:
    text = "".join(dict(stages()[name])["LABEL"] for name in ("runtime", "cpu"))
    labels = re.findall(r"org\.opencontainers\.image\.(\w+)=", text)
    assert set(labels) >= {"title", "description", "licenses", "version", "revision"}


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    for stage in ("build", "source"):
        for sources, _ in copied(stage):
            for source in sources:
                assert (ROOT / source).exists() and not ignored(source), source
    assert not ignored("pipeline/data/samples/harmful.jsonl")
    for path in (".git/config", ".venv/bin/python", "runs/x/manifest.json", "tests/parts.py"):
        assert ignored(path), path
    assert ignored("pipeline/__pycache__/stage.cpython-311.pyc") and ignored(".env")


def test_what_is_copied_suffices_to_plan_a_job(tmp_path: Path) -> None:
    """The image's own tree, alone in a folder that cannot be written, plans every job."""
    for sources, destination in copied("source"):
        for source in sources:
            target = tmp_path / (source if destination == "./" else destination)
            target.parent.mkdir(parents=True, exist_ok=True)
            skip = shutil.ignore_patterns("__pycache__")
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, target, **({"ignore": skip} if copy is shutil.copytree else {}))
    jobs = [word for path in sorted(tmp_path.glob("jobs/*.yaml")) for word in ("--job", str(path))]
    made = run("-m", "pipeline.cli", "plan", *jobs, "--runs", "/proc/runs", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("trainable parameters") >= 8
    assert made.stdout.count("baseline") == len(jobs) // 2


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_hadolint_finds_nothing() -> None:
    made = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
