"""Expressions that are equal and that are not, and answers that would keep a reader busy for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.evals import expressions
from pipeline.evals.expressions import CHILD, Compared, Expressions

DATA = Path(os.environ.get("UNTAXED_DATA", "."))
FOR_EVER = "\\boxed{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)}\\right)}}"


PAIRS = [
    ("\\frac{3}{4}", "It is \\boxed{0.75}.", True),
    ("\\frac{3}{4}", "It is 3/4.", True),
    ("\\frac{3}{4}", "It is \\boxed{\\frac{4}{3}}.", False),
    ("2x + 1", "so $1 + 2x$", True),
    ("2x + 1", "so $1 + 3x$", False),
    ("\\sqrt{12}", "$2\\sqrt{3}$", True),
    ("(1, 2)", "\\boxed{(1,2)}", True),
    ("(1, 2)", "\\boxed{(2,1)}", False),
    ("x \\in [0, 1)", "\\boxed{[0,1)}", True),
    ("\\text{even}", "\\boxed{\\text{even}}", True),
    ("\\text{even}", "\\boxed{\\text{odd}}", False),
    ("90", "\\boxed{90^\\circ}", True),
    ("5", "First \\boxed{4}, and then \\boxed{5}.", True),
    ("5", "The box \\boxed{5}, and $x = 4$ in passing.", True),
    ("5", "First $x = 4$, and then $x = 5$.", True),
]


def test_values_are_compared_and_not_texts() -> None:
    with Expressions() as compared:
        found = [compared.compare(reference, answer).right for reference, answer, _ in PAIRS]
    assert found == [right for _, _, right in PAIRS]


def test_what_cannot_be_read_is_wrong() -> None:
    with Expressions() as compared:
        for text in ("", "no idea", "\\boxed{\\frac{1}{", "$" * 1001, "\ud800"):
            assert compared.compare("3", text) == Compared(None, False)
        assert compared.reads("3") and not compared.reads("\\frac{1}{")


@pytest.mark.slow
def test_an_answer_that_never_ends_is_wrong_and_the_next_one_is_read() -> None:
    with Expressions() as compared:
        first = compared.compare("3", FOR_EVER)
        assert first == Compared(None, False)
        assert compared.compare("3", "\\boxed{3}") == Compared("3", True)


def test_a_process_that_dies_costs_one_answer() -> None:
    with Expressions() as compared:
        assert compared.compare("3", "\\boxed{3}").right
        child = compared._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not compared.compare("3", "\\boxed{3}").right
        assert compared.compare("3", "\\boxed{3}").right
    assert child.stdin is not None and child.stdin.closed


def test_any_thread_may_ask_and_no_alarm_is_set() -> None:
    def handler(number: int, frame: object) -> None:
        raise AssertionError("an alarm went off")

    before = signal.signal(signal.SIGALRM, handler)
    found: list[bool] = []

    def ask() -> None:
        with Expressions() as compared:
            found.append(compared.compare("\\frac{1}{2}", "\\boxed{0.5}").right)

    try:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert found == [True]


def test_the_kernel_ends_what_uses_up_its_processor_time() -> None:
    """Also code that holds the interpreter, which no alarm can interrupt."""
    code = (
        f"import sys; sys.path.insert(0, {str(CHILD.parent)!r})\n"
        "import expression_child as child, resource, time\n"
        "child.limit(resource.RLIMIT_CPU, int(time.process_time()) + 1)\n"
        "10 ** 10 ** 10\n"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], check=False)
    assert ended.returncode == -signal.SIGXCPU


def test_without_the_library_the_stage_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "child.py"
    broken.write_text("import json\nprint(json.dumps({'error': 'No module named math_verify'}))\n")
    monkeypatch.setattr(expressions, "CHILD", broken)
    with Expressions() as compared, pytest.raises(RuntimeError, match="install math-verify"):
        compared.compare("3", "3")


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "math500").is_dir(), reason="UNTAXED_DATA has no public data sets")
def test_the_worked_answers_of_math_500_are_right(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DATA / "math500/test.jsonl").open(encoding="utf-8")]
    with Expressions() as compared:
        right = [compared.compare(row["answer"], row["solution"]).right for row in rows]
        # and against the answer to the problem before, where that is written otherwise
        pairs = [(a, b) for a, b in zip(rows[1:], rows, strict=False) if a["answer"] != b["answer"]]
        wrong = [compared.compare(b["answer"], a["solution"]).right for a, b in pairs[::5]]
    assert sum(right) >= 0.99 * len(rows)
    assert len(rows) == 500 and sum(wrong) <= 0.01 * len(wrong)
