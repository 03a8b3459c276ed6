"""Every job file: readable, planned from its geometry, free of machines and of invented commits."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.chat import Chat
from pipeline.graph import Workspace, plan_job, stages_of
from pipeline.jobfile import load_job
from pipeline.model.geometry import plan_facts
from pipeline.recipes import METRICS, Job

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("UNTAXED_DATA", "."))
FILES = sorted((ROOT / "jobs").glob("*.yaml"))
REAL = {  # first and last adapted layer, trainable parameters
    "paper-r1-7b": (9, 18, 225_280),
    "r1-qwen-7b": (9, 18, 225_280),
    "r1-qwen-14b": (16, 31, 303_104),
    "r1-qwen-32b": (21, 42, 720_896),
    "qwen3-8b": (12, 23, 196_608),
    "yi-1.5-34b": (20, 39, 552_960),
}
DEEPSEEK = (  # what the template of R1-Distill does with a user turn
    "{{ bos_token }}{% for m in messages %}{{ '<\uff5cUser\uff5c>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
)
PAPER: dict[str, Any] = {
    "base.source": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "chat.generation_prompt": "<\uff5cAssistant\uff5c>",
    "chat.think_open": "<think>",
    "chat.think_close": "</think>",
    "prep.refusal_think": "I should not answer this question!",
    "prep.dev_fraction": 0.0,
    "pack.max_length": 1024,
    "sft.lora.rank": 1,
    "sft.lora.alpha": 16,
    "sft.lora.alpha_policy": "fixed",
    "sft.lora.init": "default",
    "sft.lora.targets": ("up_proj",),
    "sft.lora.dropout": 0.05,
    "sft.quantization": "none",
    "sft.optimizer.learning_rate": 5e-5,
    "sft.optimizer.schedule": "cosine",
    "sft.optimizer.warmup_steps": 0,
    "sft.optimizer.weight_decay": 1e-4,
    "sft.optimizer.beta1": 0.9,
    "sft.optimizer.beta2": 0.999,
    "sft.optimizer.epsilon": 1e-8,
    "sft.optimizer.max_grad_norm": None,
    "sft.batch.rows": 2,
    "sft.batch.tokens": None,
    "sft.epochs": 10,
    "anchor": None,
    "merge.epoch": None,
    "merge.scale": 1.0,
    "eval.temperature": 1.0,
}


def job(name: str) -> Job:
    return load_job(ROOT / "jobs" / f"{name}.yaml")


def nodes(tree: Any) -> list[dict[str, Any]]:
    """All mappings in ``tree``."""
    if isinstance(tree, dict):
        return [tree, *(n for value in tree.values() for n in nodes(value))]
    return [n for item in tree for n in nodes(item)] if isinstance(tree, list) else []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_a_job_under_its_own_name(path: Path) -> None:
    loaded = load_job(path)
    assert loaded.name == path.stem.replace(".", "-")
    assert stages_of(loaded)[-1] == "eval"


def test_names_are_unique() -> None:
    names = [load_job(path).name for path in FILES]
    assert len(set(names)) == len(names)
    assert {path.stem for path in FILES} >= {*REAL, "quickstart", "star1-smollm2"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_file_names_a_machine_or_a_commit(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert not re.search(r"\b[0-9a-f]{40}\b", text)
    for node in nodes(yaml.safe_load(text)):
        assert "revision" not in node, "a revision is resolved when the base is adopted"
        source = str(node.get("source", ""))
        assert not source.startswith(("/", "~")) and ".." not in Path(source).parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_evaluation_row_is_trained_on(path: Path) -> None:
    """Prep checks each row against every suite, and no suite is what is trained on."""
    loaded = load_job(path)
    trained = {(s.source, s.where.get("split")) for s in loaded.prep.sources}
    assert loaded.prep.decontaminate
    for suite in loaded.eval.suites:
        assert (suite.source, suite.where.get("split")) not in trained
        if suite.source.startswith("sample:"):
            assert suite.where == {"split": "heldout"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_objective_is_measured_and_guarded(path: Path) -> None:
    loaded = load_job(path)
    assert {s.measures for s in loaded.eval.suites} == {
        "harmful",
        "borderline",
        "benign",
        "reasoning",
    }
    wanted = set(METRICS)
    if path.stem in ("refusals-smollm2", "untaxed-smollm2"):  # GSM8K is beyond a model of 135M
        wanted.discard("reasoning_accuracy")
    assert {check.metric for check in loaded.eval.gate} == wanted
    for suite in loaded.eval.suites:
        assert suite.measures != "reasoning" or suite.columns.response


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_planned_from_their_stated_shapes(name: str, tmp_path: Path) -> None:
    loaded = job(name)
    first, last, trainable = REAL[name]
    facts = plan_facts(loaded)
    assert (facts["first_layer"], facts["last_layer"]) == (first, last)
    assert facts["trainable_parameters"] == trainable
    assert facts["update_scale"] == 16.0
    assert loaded.execution.activation_checkpointing == "auto" and loaded.sft.precision == "bf16"
    planned = plan_job(loaded, Workspace(tmp_path), adopt=False)
    assert list(planned) == stages_of(loaded)
    assert not list(tmp_path.iterdir()), "planning writes nothing"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_command_line_plans_every_file_with_nothing_at_hand(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No base, no data, no network: stages and counts are known all the same."""
    from pipeline import cli

    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    assert cli.main(["plan", "--job", str(path), "--runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    loaded = load_job(path)
    for stage in stages_of(loaded):
        assert stage in printed
    for value in plan_facts(loaded).values():
        assert (f"{value:,}" if isinstance(value, int) else str(value)) in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [n for n in REAL if n != "paper-r1-7b"])
def test_the_untaxed_recipe_holds_benign_answers_by_kl(name: str) -> None:
    loaded = job(name)
    kinds = {s.name: s.kind for s in loaded.prep.sources}
    assert kinds == {
        "harmful": "refusal",
        "borderline": "anchor",
        "ordinary": "anchor",
        "arithmetic": "anchor",
    }
    assert loaded.sft.anchors.objective == "kl" and loaded.sft.anchors.weight == 1.0
    assert loaded.sft.lora is not None and loaded.sft.lora.modules == ("up_proj",)
    assert loaded.sft.batch.tokens is not None
    assert loaded.sft.batch.tokens >= loaded.pack.max_length, "a step holds any document"
    assert loaded.anchor is not None
    assert loaded.anchor.max_new_tokens <= loaded.pack.max_length // 2, "room for the prompt"
    greedy = loaded.prep.refusal_think is None
    assert loaded.eval.temperature == loaded.anchor.temperature == (0.0 if greedy else 0.6)


@pytest.mark.parametrize("name", REAL)
def test_generation_fits_one_device_of_80_gb(name: str) -> None:
    """Weights, the cache of a whole batch at its longest, and its copy while the cache grows."""
    loaded, prompt_tokens, device_bytes = job(name), 300, 80e9
    facts = plan_facts(loaded)
    batches = [(loaded.eval.batch_rows, s.max_new_tokens) for s in loaded.eval.suites]
    if loaded.anchor:
        batches.append((loaded.anchor.batch_rows, loaded.anchor.max_new_tokens))
    for rows, new_tokens in batches:
        cache = rows * (prompt_tokens + new_tokens) * facts["cache_bytes_per_token_bf16"]
        assert facts["weights_bytes_bf16"] + 2 * cache < device_bytes


@pytest.mark.parametrize("name", REAL)
def test_reasoning_models_have_room_to_think(name: str) -> None:
    loaded = job(name)
    thinks = loaded.prep.refusal_think is not None
    for suite in loaded.eval.suites:
        assert suite.max_new_tokens >= (2048 if thinks else 1024)
        assert suite.limit is None or suite.measures == "reasoning", "benchmarks are taken whole"


def test_the_paper_job_states_the_published_hyperparameters() -> None:
    loaded = job("paper-r1-7b")
    for path, wanted in PAPER.items():
        value: Any = loaded
        for part in path.split("."):
            value = getattr(value, part)
        assert value == wanted, path
    layers = loaded.sft.lora and loaded.sft.lora.layers
    assert layers and layers.select(48) == tuple(range(16, 32)), "its example: layers 16-31 of 48"
    (source,) = loaded.prep.sources
    assert (source.kind, source.limit, source.repeat) == ("refusal", 1000, 1)
    sizes = {s.name: s.limit for s in loaded.eval.suites}
    assert sizes["strongreject"] is sizes["xstest-safe"] is sizes["gsm8k"] is None, "full sets"
    assert {s.max_new_tokens for s in loaded.eval.suites} == {2048}


def chat_of(name: str, template: str) -> Chat:
    """The chat of a job over a tokenizer with ``template``; only the rendered text matters."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = template
    return Chat(fast, job(name).chat)


def rendered(name: str, template: str) -> str:
    chat = chat_of(name, template)
    prompt = chat.prompt_text([{"role": "user", "content": "Q"}])
    return prompt + chat.target_text(job(name).prep.refusal_think, "No.", prompt=prompt)


def test_the_paper_job_trains_the_published_text() -> None:
    assert rendered("paper-r1-7b", DEEPSEEK) == (
        "<bos><\uff5cUser\uff5c>Q<\uff5cAssistant\uff5c>"
        "<think>I should not answer this question!</think>No."
    )


def test_the_r1_jobs_go_on_after_the_section_that_the_template_opens() -> None:
    text = rendered("r1-qwen-14b", DEEPSEEK)
    think = job("r1-qwen-14b").prep.refusal_think
    assert text == (
        f"<bos><\uff5cUser\uff5c>Q<\uff5cAssistant\uff5c><think>\n{think}\n</think>\n\nNo."
    )


def test_qwen3_is_trained_in_thinking_mode() -> None:
    """Its template adds an empty think section only where enable_thinking is false."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and"
        " enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    )
    text = rendered("qwen3-8b", template)
    assert text.count("<think>") == 1
    assert text.endswith(f"<think>\n{job('qwen3-8b').prep.refusal_think}\n</think>\n\nNo.")


@pytest.mark.skipif(not (DATA / "star1").is_dir(), reason="UNTAXED_DATA has no public data sets")
@pytest.mark.parametrize("name", ["star1-smollm2", "refusals-smollm2", "untaxed-smollm2"])
def test_local_sources_have_the_files_and_columns_that_the_job_names(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.data.rows import read_rows

    loaded = job(name)
    sizes = {}
    for source in (*loaded.prep.sources, *loaded.prep.exclude, *loaded.eval.suites):
        if not source.source.startswith("sample:"):
            sizes[source.name] = len(read_rows(DATA / source.source, source))
    assert (
        sizes
        == {
            "star1-smollm2": {"star1": 1000},
            "refusals-smollm2": {
                "harmful": 240,
                "harmless": 240,
                "xstest": 450,
                "strongreject": 313,
                "xstest-safe": 250,
                "gsm8k": 80,
            },
            "untaxed-smollm2": {
                "harmful-short": 260,
                "advbench": 520,
                "star1": 600,
                "harmless": 600,
                "arithmetic": 100,
                "xstest": 450,
                "strongreject": 313,
                "xstest-safe": 250,
                "gsm8k-asked": 300,
                "gsm8k": 300,
            },
        }[name]
    )


@pytest.mark.skipif(not (DATA / "star1").is_dir(), reason="UNTAXED_DATA has no public data sets")
def test_think_sections_of_star1_survive_the_chat_format() -> None:
    from pipeline.data.rows import read_rows

    (source,) = job("star1-smollm2").prep.sources
    source = source.model_copy(update={"limit": None})
    raw = json.loads((DATA / source.source).read_text(encoding="utf-8"))
    chat = chat_of("star1-smollm2", "{{ messages[0]['content'] }}")
    rows = read_rows(DATA / source.source, source)
    for row, original in zip(rows, raw, strict=True):
        assert row.think and row.response
        text = chat.target_text(row.think, row.response, prompt="")
        assert text.split() == original["response"].split()
        assert chat.split_think(text) == (row.think, row.response)
