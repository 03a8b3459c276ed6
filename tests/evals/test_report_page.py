"""The report in a real browser: nothing asked of the network, no error, no sideways scrolling, and text
that can be read, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, Page
from report_blocks import full
from report_rows import BASE, TRAP, report_of, rows_of

from pipeline.evals.report import compare_reports

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every part over two jobs, whose answers hold long words and hostile HTML."""
    folder = tmp_path_factory.mktemp("report")
    first, responses, history = full(meets=False)
    aligned = responses["aligned"]
    aligned[0]["response"] = "<script>document.title = 'taken'</script>" + "w" * 3000
    aligned[1]["prompt"] = '<img src="http://203.0.113.1/x.png" onerror="document.title=1">'
    aligned[2]["response"] = "</div></details><iframe src='http://203.0.113.1/'></iframe>"
    first["generation"]["aligned"]["served"]["id"] = "a" * 300
    trap = report_of("refusals-only", rows_of(BASE, 1), rows_of(TRAP, 3))
    compare_reports([first, trap], responses, history, folder)
    return folder / "report.html"


OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_page_is_quiet_and_fits(page: Page, report: Path, width: int, scheme: str) -> None:
    page.open(report, width=width, scheme=scheme)
    page.value(OPEN)
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
    assert len(heights) >= 13 and min(heights) > 40
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


# Each text's colour against what is painted below it: backgrounds, and shapes of drawings.
CONTRASTS = """(() => {
  const numbers = (text) => {
    const found = (text.match(/[-0-9.e]+/g) || [0, 0, 0, 0]).map(Number);
    return text.startsWith("rgb") ? (found.length < 4 ? [...found, 1] : found) : [0, 0, 0, 0];
  };
  const over = (top, below) => below.map((v, i) => top[i] * top[3] + v * (1 - top[3]));
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const own = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || own.closest("script")) continue;
    const range = document.createRange();
    range.selectNodeContents(walk.currentNode);
    const box = [...range.getClientRects()].find((r) => r.width > 1 && r.height > 1);
    if (!box) continue;
    const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const at = stack.indexOf(own);
    if (at < 0) continue;
    let paper = [255, 255, 255];
    for (const element of stack.slice(at).reverse()) {
      if (element === own && own.ownerSVGElement) continue;
      const style = getComputedStyle(element);
      const colour = numbers(element.ownerSVGElement ? style.fill : style.backgroundColor);
      if (element.ownerSVGElement) colour[3] *= Number(style.opacity) * Number(style.fillOpacity);
      paper = over(colour, paper);
    }
    const style = getComputedStyle(own);
    const ink = over(numbers(own.ownerSVGElement ? style.fill : style.color), paper);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const svg = own.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    found.push([walk.currentNode.data.trim().slice(0, 40), (a + 0.05) / (b + 0.05),
      parseFloat(style.fontSize) * scale, !!svg]);
  }
  return found;
})()"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Page, report: Path, scheme: str, width: int) -> None:
    """WCAG 2's contrast of 4.5 (AA), and no text smaller than 9 pixels in drawings, 11 elsewhere."""
    page.open(report, width=width, height=30_000, scheme=scheme)
    page.value(OPEN.replace("details", "details:not(.exchange, .suite)"))
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(17, 22, 27)") == (scheme == "dark")
    found = page.value(CONTRASTS)
    assert len(found) > 600 and sum(drawn for *_, drawn in found) > 120
    assert [one for one in found if one[1] < 4.5] == []
    assert [one for one in found if one[2] < (9 if one[3] else 11)] == []
