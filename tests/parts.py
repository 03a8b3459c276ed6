"""Small real parts for the tests: a random decoder, a trained tokenizer, sealed artifacts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers with two threads each wait for one another
# kubectl and hadolint are packages of pip, and lie beside the interpreter
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.recipes import Columns, Suite

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "pipeline" / "data" / "samples"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sample_rows(name: str) -> list[dict[str, Any]]:
    lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 600 tokens trained on the samples, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] for row in sample_rows("harmful") + sample_rows("borderline")]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def make_model(folder: Path, architecture: str = "llama", seed: int = 0, **shape: Any) -> None:
    """A random decoder of ``architecture`` (llama, qwen2, qwen3, mistral, ...) in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 608,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    } | shape
    config = AutoConfig.for_model(architecture, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="200KB")


def adopt_folder(runs: Path, folder: Path) -> Artifact:
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe

    return adopt_base(BaseRecipe(source=str(folder)), Workspace(runs))


def seal_as(
    runs: Path,
    stage: str,
    fill: Callable[[Path], dict[str, Any] | None],
    recipe: dict[str, Any] | None = None,
) -> Artifact:
    """Seal what ``fill`` writes as an artifact of ``stage``."""
    final = runs / f"{stage}-{len(list(runs.iterdir())):04d}"
    staging = art.stage_folder(final)
    facts = fill(staging) or {}
    return art.seal(
        staging,
        final,
        stage=stage,
        stage_version=1,
        key=final.name.rpartition("-")[2],
        recipe=recipe or {},
        inputs={},
        facts=facts,
        seconds=0.0,
    )


def seal_rows(runs: Path, rows: list[dict[str, Any]]) -> Artifact:
    """``rows`` as an adopted data file."""

    def fill(folder: Path) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text)

    return seal_as(runs, "data", fill)


def conversations(rows: int, *, anchors: int = 0, dev: int = 2) -> Callable[[Path], None]:
    """Writes train.jsonl and dev.jsonl of ``rows`` refusals and ``anchors`` answered anchors."""

    def fill(folder: Path) -> None:
        harmful, borderline = sample_rows("harmful"), sample_rows("borderline")
        made = [_row("harmful", i, "refusal", harmful[i]) for i in range(rows + dev)]
        for i in range(anchors):
            row = borderline[i] | {"response": "Sure. " + borderline[i]["prompt"]}
            made.append(_row("borderline", i, "anchor", row))
        train, held = made[dev:], made[:dev]
        for name, part in (("train", train), ("dev", held)):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    return fill


def _row(source: str, index: int, kind: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{source}:{index}",
        "source": source,
        "kind": kind,
        "category": row.get("category"),
        "messages": [{"role": "user", "content": row["prompt"]}],
        "think": None,
        "response": row["response"],
    }


def sample_suites(names: Mapping[str, str], *, max_new_tokens: int) -> tuple[Suite, ...]:
    """A suite for each measure, of the sample that ``names`` has for it."""
    return tuple(
        Suite(
            name=name,
            measures=measures,
            source=f"sample:{name}",
            columns=Columns(response="answer" if measures == "reasoning" else None),
            max_new_tokens=max_new_tokens,
        )
        for measures, name in names.items()
    )
