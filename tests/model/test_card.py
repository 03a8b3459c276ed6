"""The model card says what the manifests say, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from parts import seal_as

from pipeline.artifact import Artifact
from pipeline.model.card import layer_ranges, model_card

CERTIFICATE: dict[str, Any] = {
    "method": "lora",
    "epoch": 3,
    "rank": 1,
    "factor": 16.0,
    "pairs": [f"model.layers.{i}.mlp.up_proj" for i in (9, 10, 11, 20)],
    "dtype": "BF16",
    "changed": 4,
    "unchanged": 100,
    "survival": {"share": 0.98765432},
    "weights_digest": "ab" * 32,
}


def card(runs: Path, files: dict[str, str], **facts: Any) -> str:
    def fill(folder: Path) -> dict[str, Any]:
        for name, text in files.items():
            (folder / name).write_text(text)
        return {"source": "org/model", "commit": None} | facts

    base: Artifact = seal_as(runs, "base", fill)
    sft = seal_as(runs, "sft", lambda folder: {"sources": {"harmful": 120, "ordinary": 80}})
    text = model_card(base, sft, CERTIFICATE)
    assert base.digest in text
    assert sft.digest in text
    return text


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def test_facts_of_the_inputs(runs: Path) -> None:
    text = card(runs, {}, commit="c0ffee")
    for row in (
        "| base | org/model at c0ffee |",
        "| rank | 1 |",
        "| targets | up_proj |",
        "| layers | 9-11, 20 |",
        "| epoch | 3 |",
        "| share of the update in the file | 0.987654 |",
        "| rows from harmful | 120 |",
        "| rows from ordinary | 80 |",
    ):
        assert row in text.splitlines()
    assert front_matter(text)["base_model"] == "org/model"
    assert "See the base model." in text


@pytest.mark.parametrize("source", ["./models/x", "wheel:package/x.gguf", "/models/x"])
def test_only_a_hub_id_is_a_base_model(runs: Path, source: str) -> None:
    text = card(runs, {}, source=source)
    assert "base_model" not in front_matter(text)
    assert f"| base | {source} |" in text


def test_licence_of_the_base(runs: Path) -> None:
    text = card(runs, {"LICENSE": "\n   Apache License\n  Version 2.0\n"})
    assert "Apache License (the base's own `LICENSE`, in this folder)." in text
    assert "license" not in front_matter(text)
    text = card(runs, {"README.md": "---\nlanguage: en\nlicense: mit\n---\n# Base\n"})
    assert front_matter(text)["license"] == "mit"
    assert "names: mit." in text
    assert "See the base model." in card(runs, {"README.md": "license: mit\n"})


def test_layer_ranges() -> None:
    assert layer_ranges(["model.layers.3.a", "model.layers.3.b", "model.layers.4.a"]) == "3-4"
    assert layer_ranges(["lm_head"]) == "outside the layers"


def test_what_was_chosen_and_how(runs: Path) -> None:
    """Only where there was a choice; it is what the choose stage said."""
    base = seal_as(runs, "base", lambda folder: {"source": "org/model"})
    sft = seal_as(runs, "sft", lambda folder: {})
    chosen = {"verdict": "Epoch 3 at scale 0.75: the best", "choice_digest": "cd" * 32}
    text = model_card(base, sft, CERTIFICATE | {"scale": 0.75, "chosen": chosen})
    for row in (
        "| scale of the update | 0.75 |",
        "| how epoch and scale were chosen | Epoch 3 at scale 0.75: the best |",
        f"| choice digest (SHA-256) | {'cd' * 32} |",
    ):
        assert row in text.splitlines()
    assert "chosen" not in model_card(base, sft, CERTIFICATE)
