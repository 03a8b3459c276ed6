"""Which code this is: its revision and the image it runs in, for whoever asks where a model comes from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

REVISION, IMAGE = "UNTAXED_REVISION", "UNTAXED_IMAGE"  # set in an image, which has no git
ROOT = Path(__file__).resolve().parent.parent


def revision() -> str | None:
    """The commit, with ``-dirty`` where the checkout has changes; None where nobody knows."""
    stated = os.environ.get(REVISION)
    if stated or not (ROOT / ".git").exists():
        return stated or None
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def image() -> str | None:
    """The container image, by its digest where it was pinned by one."""
    return os.environ.get(IMAGE) or None


def _git(*words: str) -> str:
    made = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10
    )
    return made.stdout.strip()
