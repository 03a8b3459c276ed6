"""How the numbers came about: who answered, what was read, which judges agree, and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evals.exchanges import Exchange
from pipeline.evals.pictures import Report, Rows
from pipeline.evals.score import REFUSED
from pipeline.evals.wording import DASH, MEASURES, clean, known, percent

MODELS = ("base", "aligned")
PROGRAMS = {
    "passed": "passed its tests",
    "failed": "failed",
    "time": "took too long",
    "memory": "took too much memory",
    "output": "wrote too much",
    "disk": "filled its disk",
    "processes": "started too many processes",
    "no code": "no code in the answer",
}
PROMPTS = {
    "tokens": "asked with the very tokens of training",
    "text": "asked with the text that training sees",
    "chat": "asked through the server's own chat template",
}
JUDGES = {
    "wording": "does the answer decline?",
    "guard": "is the answer safe?",
    "rubric": "does it decline, and how useful is it?",
}
RATES = {
    "harmful_unsafe": "answers not called safe",
    "harmful_score": "how useful they are: 0 not at all, 1 fully",
}


def programs(responses: Mapping[str, Rows]) -> dict[str, Any]:
    """How the programs of each code suite ended, for each model; empty where there are none."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for model in MODELS:
        for row in responses[model]:
            if row.get("program"):
                found.setdefault((row["suite"], model), Counter())[str(row["program"])] += 1
    seen = {how for counts in found.values() for how in counts}
    names = [name for name in PROGRAMS if name in seen] + sorted(seen - set(PROGRAMS))
    lines = [
        {"suite": suite, "model": model, "rows": counts.total(), "ended": counts}
        for (suite, model), counts in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return {"names": [(name, PROGRAMS.get(name, name)) for name in names], "lines": lines}


def unreadable(responses: Mapping[str, Rows]) -> dict[tuple[str, str], int]:
    """For each (suite, model) whose answers are read for a solution: in how many none was found."""
    found: dict[tuple[str, str], int] = {}
    for model in MODELS:
        for row in responses[model]:
            if "extracted" in row:
                key = row["suite"], model
                found[key] = found.get(key, 0) + (row["extracted"] is None)
    return found


def errors(report: Report) -> dict[str, tuple[int, int]]:
    """For each model with answers that could not be had: how many, of how many."""
    found = {}
    for model, suites in (report.get("responses") or {}).items():
        lost = sum(counts.get("error", 0) for counts in suites.values())
        if lost:
            found[model] = lost, sum(counts["rows"] for counts in suites.values())
    return found


def answered_by(report: Report) -> list[tuple[str, str]]:
    """(which model, who answered as it), one line where both answered in one way."""
    facts = report.get("generation") or {}
    lines = [(model, _engine(facts[model])) for model in MODELS if facts.get(model)]
    if len(lines) == 2 and lines[0][1] == lines[1][1]:
        return [("base and aligned", lines[0][1])]
    return lines


def _engine(facts: Mapping[str, Any]) -> str:
    if facts.get("engine") == "embedded":
        return "the weights themselves, loaded by the evaluation"
    served = facts.get("served") or {}
    how = PROMPTS.get(str(facts.get("prompt")), "")
    longest = served.get("max_model_len")
    return ", ".join(
        part
        for part in (
            f"a server, under the name {clean(served.get('id', 'not stated'))}",
            how,
            f"at most {longest:,} tokens" if isinstance(longest, int) else "",
            "not the same to the bit when asked again",
        )
        if part
    )


def drawn(report: Report) -> str:
    """How answers were drawn, in words."""
    settings = (report.get("recipe") or {}).get("eval") or {}
    samples, temperature = int(report.get("samples") or 1), settings.get("temperature")
    if samples > 1:
        top = settings.get("top_p", 1.0)
        within = f" from the likeliest {percent(top)}" if known(top) and top < 1 else ""
        return (
            f"{samples} answers to each request, drawn at temperature {temperature:g}{within}; a row"
            " counts with the share of its answers"
        )
    if temperature is None:
        return "one answer to each request"
    if temperature == 0:
        return "one answer to each request, always the likeliest next word"
    return f"one answer to each request, drawn at temperature {temperature:g}"


def tokens(report: Report) -> list[tuple[str, str]]:
    """(what, how many tokens) of training and answering, as far as they were counted."""
    counted = report.get("tokens") or {}
    trained, made = counted.get("trained"), counted.get("generated") or {}
    lines = []
    if trained:
        part = percent(trained["learned"] / trained["read"], 1000) if trained["read"] else DASH
        lines.append(
            (
                "read in training, all epochs together",
                f"{trained['read']:,}, of which {trained['learned']:,} ({part}) were learned from",
            )
        )
    for model in MODELS:
        if model in made:
            lines.append((f"written by the {model} model", f"{made[model]:,}"))
    return lines


def twin_lines(report: Report) -> list[dict[str, Any]]:
    """Precision and recall of refusal for each source with harmful and harmless rows."""
    twins = report.get("twins") or {}
    found = []
    for source, aligned in (twins.get("aligned") or {}).items():
        base = (twins.get("base") or {}).get(source, {})
        for name, title, of in (
            ("refusal_recall", "Harmful requests that are refused", "harmful requests"),
            ("refusal_precision", "Refused requests that are harmful", "refused requests"),
        ):
            found.append(
                {
                    "source": clean(source),
                    "suites": ", ".join(map(clean, aligned["suites"])),
                    "rows": f"{aligned['harmful']:,} harmful, {aligned['harmless']:,} harmless",
                    "title": title,
                    "name": name,
                    "base": _share(base.get(name), of),
                    "aligned": _share(aligned[name], of),
                }
            )
    return found


def _share(measured: Mapping[str, Any] | None, of: str) -> tuple[str, str]:
    if not measured:
        return DASH, "not measured"
    if measured["value"] is None:
        return DASH, f"no {of}"
    low, high = (percent(measured[end], measured["n"]) for end in ("low", "high"))
    return percent(measured["value"], measured["n"]), f"{low} to {high}, of {measured['n']:,} {of}"


def judges(report: Report) -> dict[str, Any] | None:
    """What several judges said of the same answers; None where there was only one."""
    block = report.get("judges")
    if not block:
        return None
    seen = {v for counts in block["verdicts"].values() for v in counts}
    guards = {name for name in block["names"] if _asks_for_safety(name, block)}
    return {
        "names": [
            {
                "title": judge_title(name),
                "counts": block["verdicts"].get(name, {}),
                "invalid": block["invalid"].get(name, 0),
            }
            for name in block["names"]
        ],
        "seen": sorted(seen),
        "pairs": [_agreement(pair) for pair in block["agreement"]],
        "unlike": 0 < len(guards) < len(block["names"]),
        "rates": _rates(block.get("rates") or {}),
    }


def _asks_for_safety(name: str, block: Mapping[str, Any]) -> bool:
    """Whether a judge says that answers are safe, and not that they decline."""
    return name.startswith("guard:") or "safe" in block["verdicts"].get(name, {})


def judge_title(name: str) -> str:
    """What a judge is called on the page, and what it is asked where its name says its kind."""
    asked = JUDGES.get(name.partition(":")[0])
    return f"{clean(name)} ({asked})" if asked else clean(name)


def _agreement(pair: Mapping[str, Any]) -> dict[str, Any]:
    n, kappa = int(pair["n"]), pair["kappa"]
    ends = [percent(pair[end], n) for end in ("low", "high") if known(pair[end])]
    return {
        "one": clean(pair["one"]),
        "other": clean(pair["other"]),
        "of": MEASURES.get(pair["suite_measures"], clean(pair["suite_measures"])),
        "n": f"{n:,}",
        "share": percent(pair["share"], n) if n and known(pair["share"]) else DASH,
        "interval": " to ".join(ends) if len(ends) == 2 else "interval not known",
        "kappa": f"{kappa:.2f}".replace("-", "\u2212") if known(kappa) else DASH,
    }


def _rates(rates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each further judge says of the answers to harmful requests, for both models."""
    return [
        {
            "name": clean(name),
            "title": RATES.get(metric, clean(metric)),
            **{model: _rate(metric, rates.get(model, {}).get(name, {})) for model in MODELS},
        }
        for name, measured in (rates.get("aligned") or {}).items()
        for metric in measured
    ]


def _rate(metric: str, measured: Mapping[str, Any]) -> tuple[str, str]:
    found = measured.get(metric)
    if not found:
        return DASH, "not judged"
    n = int(found["n"])
    value, low, high = (
        percent(found[part], n) if metric == "harmful_unsafe" else f"{found[part]:.2f}"
        for part in ("value", "low", "high")
    )
    return value, f"{low} to {high}, n = {n:,}"


def disagreements(report: Report, shown: Sequence[Exchange]) -> list[Exchange]:
    """Those of ``shown`` that the judges disagree on, of judges that ask alike (see ``judges``)."""
    block = report.get("judges") or {}
    ids = {clean(name) for name in block.get("disagreements", ())}
    found = []
    for one in (one for one in shown if one.id in ids):
        said = [v for name, v in one.aligned.judges if not _asks_for_safety(name, block)]
        if (
            one.measures == "harmful"
            or len({v in REFUSED for v in (one.aligned.verdict, *said)}) > 1
        ):
            found.append(one)
    return found
