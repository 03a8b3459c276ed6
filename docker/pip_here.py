"""Lets a build by buildah know what pip is told on this machine: pip_here.py FILE

Writes FILE, a configuration of pip that the build gets as a secret and does not keep, and prints options:
folders of wheels and indexes in files are mounted where they lie.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

TOLD = ("find-links", "index-url", "extra-index-url")


def settings(lines: list[str]) -> dict[str, str]:
    """``lines``: as ``pip config list`` prints them, such as ``global.find-links='/wheels'``."""
    found = {}
    for line in lines:
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return found


def options(told: dict[str, str], file: Path) -> list[str]:
    """Writes ``file``; returns the options."""
    kept = [f"{name} = {' '.join(told[name].split())}" for name in TOLD if name in told]
    file.write_text("\n".join(["[global]", *kept, ""]), encoding="utf-8")
    words = [word for name in TOLD for word in told.get(name, "").split()]
    folders = sorted({folder for folder in map(local, words) if folder is not None})
    made = [f"--secret=id=pip,src={file}", *(f"--volume={one}:{one}:ro" for one in folders)]
    if "cert" in told:
        made.append(f"--secret=id=ca,src={told['cert']}")
    if any(list(folder.glob("torch-*.whl")) for folder in folders):
        made.append("--build-arg=TORCH_INDEX_URL=")
    return made


def local(word: str) -> Path | None:
    """The folder of this machine that a link or an index names."""
    path = Path(urlparse(word).path if word.startswith("file://") else word)
    while path.is_absolute() and path.name == "simple":  # the files of an index lie beside it
        path = path.parent
    return path if path.is_absolute() and path.is_dir() else None


if __name__ == "__main__":
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    print("\n".join(options(settings(said.stdout.splitlines()), Path(sys.argv[1]))))
