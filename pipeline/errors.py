"""Errors that a user can act on; the class decides the exit code, the code decides the retry.

Every message is one line: what, where, got, wanted, and the way out.
"""


class UntaxedError(Exception):
    """Base of all expected failures. Exit code 1: another try may help."""

    exit_code = 1


class RecipeError(UntaxedError):
    """The job file (or an option) asks for something that cannot be. Exit code 78, never retried."""

    exit_code = 78


class DataError(UntaxedError):
    """Input rows, files or artifacts are broken or missing. Exit code 65, never retried."""

    exit_code = 65


class Stopped(UntaxedError):
    """Stopped on request (SIGTERM, Ctrl-C) after saving its place. Exit code 143, resumes."""

    exit_code = 143


def one_line(error: BaseException) -> str:
    """The message of ``error`` folded onto one line."""
    return " ".join(str(error).split()) or type(error).__name__
