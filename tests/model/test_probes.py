"""Streamed logits against models loaded whole."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from parts import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from pipeline.model import probes
from pipeline.model.probes import difference, probe_ids, probe_logits
from pipeline.model.shards import open_checkpoint


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_loaded_models(tmp_path: Path, architecture: str, tied: bool) -> None:
    make_model(tmp_path, architecture, num_hidden_layers=2, tie_word_embeddings=tied)
    ids = probe_ids(600)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.inference_mode():
        want = model(input_ids=ids).logits
    got = probe_logits(tmp_path, open_checkpoint(tmp_path).read, ids)
    assert difference(want, got) < 1e-6


def test_logits_with_an_adapter_at_a_scale(tmp_path: Path) -> None:
    make_model(tmp_path, num_hidden_layers=2)
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path),
        LoraConfig(r=2, lora_alpha=6, target_modules=["up_proj", "v_proj"]),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path), str(tmp_path / "adapter")
    ).eval()
    ids = probe_ids(600)
    with torch.inference_mode():
        want = loaded(input_ids=ids).logits
    read = open_checkpoint(tmp_path).read
    alone = probe_logits(tmp_path, read, ids)
    full = probe_logits(tmp_path, read, ids, adapter=tmp_path / "adapter")
    assert difference(want, full) < 1e-6 < 1e-3 < difference(want, alone)
    none = probe_logits(tmp_path, read, ids, adapter=tmp_path / "adapter", scale=0.0)
    assert difference(alone, none) < 1e-6


def test_lanes_are_what_each_model_gives_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the adapter on the first alone, and every shared weight read once."""
    make_model(tmp_path, num_hidden_layers=3)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up_proj", "v_proj"], layers_to_transform=[1])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    own = [f"model.layers.1.{m}.weight" for m in ("mlp.up_proj", "self_attn.v_proj")]
    read = open_checkpoint(tmp_path).read
    times: Counter[str] = Counter()

    def counted(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        times[name] += 1
        return read(name, start, stop)

    def doubled(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return read(name, start, stop) * (2 if name in own else 1)

    ids = probe_ids(600)
    got = probes.probe_lanes(
        tmp_path, [counted, doubled, read, doubled], own, ids, adapter=tmp_path / "adapter"
    )
    want = [
        probe_logits(tmp_path, read, ids, adapter=tmp_path / "adapter"),
        probe_logits(tmp_path, doubled, ids),
        probe_logits(tmp_path, read, ids),
    ]
    for lane, logits in zip(got, [*want, want[1]], strict=True):
        assert torch.equal(lane, logits)
    assert not any(torch.equal(a, b) for a, b in combinations(want, 2))
    assert {n for n, count in times.items() if count > 1} <= {"model.embed_tokens.weight"}
    with pytest.raises(probes.Unsuited):
        probes.probe_lanes(tmp_path, [read, doubled], ["model.norm.weight"], ids)


def test_weights_are_read_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than one block of one weight is alive, every weight is met, and the logits do not
    depend on the blocks."""
    import weakref

    make_model(tmp_path, num_hidden_layers=3)
    checkpoint = open_checkpoint(tmp_path)
    whole = probe_logits(tmp_path, checkpoint.read, probe_ids(600))
    monkeypatch.setattr(probes, "BLOCK_ELEMENTS", 1000)
    alive: list[weakref.ref[torch.Tensor]] = []
    met: set[str] = set()
    most = 0

    def read(name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        nonlocal most
        tensor = checkpoint.read(name, start, stop)
        assert tensor.dim() == 1 or name.endswith("norm.weight") or tensor.numel() <= 1000
        met.add(name)
        if "embed" not in name:  # of the embedding a row for each token is kept
            alive.append(weakref.ref(tensor.untyped_storage()))
            most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    blocks = probe_logits(tmp_path, read, probe_ids(600))
    assert met == set(checkpoint.where)
    assert most == 1
    assert difference(whole, blocks) < 1e-6


def test_probe_ids_are_seeded_and_in_range() -> None:
    assert torch.equal(probe_ids(100), probe_ids(100))
    assert not torch.equal(probe_ids(100), probe_ids(100, seed=1))
    assert probe_ids(7).shape == (2, 4)
    assert int(probe_ids(7).max()) == 6
