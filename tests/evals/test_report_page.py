"""The report in a real browser: nothing asked of the network, no error, no sideways scrolling."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_rows import ALIGNED, BASE, TRAP, history_of, report_of, rows_of

from pipeline.evals.report import compare_reports

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
SECONDS = 60.0
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Page:
    """A page of headless Chromium, driven by the DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        assert BROWSER is not None
        theirs_in, self.sender = os.pipe()
        self.receiver, theirs_out = os.pipe()
        # the protocol wants descriptors 3 and 4
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.events: list[dict[str, Any]] = []
        self.buffer, self.number, self.session = b"", 0, ""
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one protocol call; events that come first are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.sender, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.receiver], [], [], until - time.monotonic())
            block = os.read(self.receiver, 1 << 16) if ready else b""
            assert block, "the browser did not answer"
            self.buffer += block
        line, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, *, width: int) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def value(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.sender)
        self.process.terminate()
        self.process.wait(SECONDS)
        os.close(self.receiver)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two jobs whose answers hold long words and hostile HTML."""
    folder = tmp_path_factory.mktemp("report")
    base, aligned, trap = rows_of(BASE, 1), rows_of(ALIGNED, 2), rows_of(TRAP, 3)
    aligned[0]["response"] = "<script>document.title = 'taken'</script>" + "w" * 3000
    aligned[1]["prompt"] = '<img src="http://203.0.113.1/x.png" onerror="document.title=1">'
    aligned[2]["response"] = "</div></details><iframe src='http://203.0.113.1/'></iframe>"
    reports = [report_of("quickstart", base, aligned), report_of("refusals-only", base, trap)]
    compare_reports(reports, {"base": base, "aligned": aligned}, history_of(), folder)
    return folder / "report.html"


@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_quiet_and_fits(page: Page, report: Path, width: int) -> None:
    page.open(report, width=width)
    page.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("document.title").startswith("quickstart: gate")
    methods = [event.get("method") for event in page.events]
    asked = [
        event["params"]["request"]["url"]
        for event in page.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert asked == [report.as_uri()]
    assert "Runtime.exceptionThrown" not in methods
    assert "Runtime.consoleAPICalled" not in methods
    assert [e for e in page.events if e.get("method") == "Log.entryAdded"] == []


def test_drawings_have_a_size_and_no_two_ids_are_alike(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    heights = page.value(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(heights) >= 12 and min(heights) > 40
    repeated = page.value(
        "(() => { const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
        " return ids.filter((id, i) => ids.indexOf(id) !== i) })()"
    )
    assert repeated == []


def test_search_leaves_what_matches(page: Page, report: Path) -> None:
    page.open(report, width=1280)
    shown = "document.querySelectorAll('#all .exchange:not([hidden])').length"
    everything = page.value(shown)
    assert page.value("document.getElementById('tools').hidden") is False
    page.value(
        "(() => { const box = document.getElementById('words'); box.value = 'lost-sum 1234';"
        " box.dispatchEvent(new Event('input')) })()"
    )
    assert 0 < page.value(shown) < everything
    assert page.value(
        "[...document.querySelectorAll('#all .exchange:not([hidden])')]"
        ".every(e => e.dataset.measures === 'reasoning' && e.textContent.includes('LOST-SUM'))"
    )
