"""A process beside a training that brings the spool to the store of runs.

Importing mlflow and waiting for a server take seconds, which a training shall not lose: the stage puts
its events in the spool, and this process takes them from there. While the store is away it tries again
by itself, so that a server which comes back in the middle of a training gets its runs then.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RETRY_SECONDS = 30.0
FIRST_SECONDS = 5.0  # without a word after its start: the store is not waited for
LAST_SECONDS = 60.0  # for what is still to be said when the stage has ended
ANSWERS, AWAY, RECORDED = "answers", "away", "recorded"


class Recorder:
    """The process as the stage sees it. It is started by the first event."""

    def __init__(self, runs: Path, retry: float = RETRY_SECONDS) -> None:
        self.runs, self.retry = runs, retry
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0
        self.heard = b""

    def look(self) -> None:
        """There is something new in the spool. OSError where no process can be started."""
        if self.process is None:
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.recorder", str(self.runs), str(self.retry)],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # who stops the stage does not stop what records the stop
            )
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), b"\n")

    def close(self) -> None:
        """No more comes. Waits for a store that answers, and not for one that does not: what it
        misses stays in the spool."""
        process = self.process
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
            ended = time.monotonic()
            while (seconds := self._patience(ended)) > 0:
                if self._listen(seconds) == b"":
                    break
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            self.process = None

    def _patience(self, ended: float) -> float:
        """Seconds that are left to wait, after all that it has said so far."""
        while self._listen(0.0):
            pass
        word = self.heard.decode().split()[-1:]
        if word == [AWAY]:
            return 0.0
        until = ended + LAST_SECONDS if word else self.began + FIRST_SECONDS
        return until - time.monotonic()

    def _listen(self, seconds: float) -> bytes | None:
        """What it says within ``seconds``: None for nothing, no bytes once it has ended."""
        assert self.process is not None and self.process.stdout is not None
        stream = self.process.stdout.fileno()
        if not select.select([stream], [], [], seconds)[0]:
            return None
        said = os.read(stream, 4096)
        self.heard += said
        return said


def main(runs: Path, retry: float) -> int:
    """Record what waits, at each line of standard input and until it ends."""
    from pipeline.tracking import Replay

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    replay = Replay(runs, lambda: _say(ANSWERS))
    while True:
        away = not replay.now()
        _say(AWAY if away else RECORDED)
        if select.select([0], [], [], retry if away else None)[0] and not os.read(0, 4096):
            return 0


def _say(word: str) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
