"""What runs as the first process of a container: the given command, with an honest exit code.

Any command replaces this process, so that it hears SIGTERM itself. ``torchrun`` is different: it
turns every failure of a rank into exit code 1, but the retry policy of a Job reads the code (78 and
65 are never retried, 143 goes on where it stopped). So its launcher runs here, and the code of the
rank that failed first becomes the container's.
"""

from __future__ import annotations

import os
import signal
import sys

USAGE = 64
NOT_FOUND = 127


def main(command: list[str]) -> int:
    """Run ``command``; returns only for torchrun and for a command that cannot be started."""
    if not command:
        print("entrypoint: no command; give one, such as: untaxed --help", file=sys.stderr)
        return USAGE
    if command[0] == "torchrun":
        return torchrun(command[1:])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"entrypoint: {command[0]}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND


def torchrun(arguments: list[str]) -> int:
    """torchrun in this process; returns the exit code of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # until the agent has its own handler, the first process of a container would ignore SIGTERM
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        print(f"entrypoint: rank {rank} ended first, with exit code {code}", file=sys.stderr)
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
