"""The base's predictions on anchors: read, lost, damaged or disabled, they are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import KL, LORA, train

from pipeline.artifact import Artifact
from pipeline.model.base import load_model
from pipeline.recipes import AnchorLoss
from pipeline.train import reference
from pipeline.train.batches import Documents
from pipeline.train.reference_cache import HASH_BYTES

ADAPTER = "epoch-2/adapter_model.safetensors"
DROPOUT = KL | {"lora": LORA | {"dropout": 0.2}}  # draws random numbers in every forward pass


def stored(cache: Path) -> list[Path]:
    return sorted(cache.glob("reference-*/rows.bin"))


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Artifact]
) -> tuple[Path, bytes]:
    """The cache of a first run, and its adapter."""
    folder = tmp_path_factory.mktemp("first")
    out = train(folder / "out", inputs, DROPOUT, folder / "cache")
    return folder / "cache", (out / ADAPTER).read_bytes()


def test_it_holds_what_the_plain_model_predicts(
    first: tuple[Path, bytes], inputs: dict[str, Artifact]
) -> None:
    (path,) = stored(first[0])
    documents = Documents(inputs["pack"], "train", AnchorLoss(objective="kl"))
    model = load_model(inputs["base"].folder, torch.float32)
    k = AnchorLoss().top_k
    wanted = []
    for d in documents.kl_documents:
        with torch.no_grad():
            log_p = model(documents.tokens_of(d)[None]).logits[0].log_softmax(-1)
        wanted.append(log_p[:-1][documents.trained_of(d)[1:]].topk(k))
    content = path.read_bytes()[HASH_BYTES:]
    size = documents.reference_rows * k
    ids = np.frombuffer(content, np.int32, size).reshape(-1, k)
    log_probs = np.frombuffer(content, np.float32, size, offset=4 * size).reshape(-1, k)
    assert np.array_equal(ids[:, 0], torch.cat([w.indices for w in wanted])[:, 0].numpy())
    assert np.abs(log_probs - torch.cat([w.values for w in wanted]).numpy()).max() <= 1e-4


def test_later_runs_read_it_and_train_to_the_same_bits(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    first: tuple[Path, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, adapter = first
    monkeypatch.setattr(reference, "_compute", lambda *given: pytest.fail("computed again"))
    again = train(tmp_path / "again", inputs, DROPOUT, cache)
    assert (again / ADAPTER).read_bytes() == adapter
    other = DROPOUT | {"optimizer": {"learning_rate": 0.01}, "seed": 3}
    train(tmp_path / "other", inputs, other, cache)


@pytest.mark.parametrize("harm", ["flipped", "cut short", "empty", "gone"])
def test_a_damaged_or_lost_file_changes_no_bit(
    tmp_path: Path, inputs: dict[str, Artifact], first: tuple[Path, bytes], harm: str
) -> None:
    cache, adapter = first
    (path,) = stored(cache)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.unlink()
    if harm != "gone":
        path.write_bytes({"flipped": flipped, "cut short": whole[:-8], "empty": b""}[harm])
    again = train(tmp_path / "again", inputs, DROPOUT, cache)
    assert (again / ADAPTER).read_bytes() == adapter
    assert path.read_bytes() == whole


def test_without_room_nothing_is_kept_and_no_bit_changes(
    tmp_path: Path, inputs: dict[str, Artifact], first: tuple[Path, bytes]
) -> None:
    none = train(tmp_path / "none", inputs, DROPOUT, tmp_path / "cache", prefix_cache_gb=0.0)
    assert not stored(tmp_path / "cache")
    assert (none / ADAPTER).read_bytes() == first[1]


@pytest.mark.parametrize(
    ("change", "execution"),
    [
        ({"anchors": KL["anchors"] | {"top_k": 8}}, {}),
        ({"precision": "bf16"}, {}),
        ({"lora": LORA | {"layers": {"first": 2, "last": 5}}}, {}),
        ({}, {"frozen_prefix": False}),
    ],
    ids=["top_k", "precision", "cut", "whole model"],
)
def test_what_decides_a_bit_has_a_file_of_its_own(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    change: dict[str, Any],
    execution: dict[str, Any],
) -> None:
    train(tmp_path / "one", inputs, KL | {"epochs": 1}, tmp_path / "cache")
    train(tmp_path / "other", inputs, KL | {"epochs": 1} | change, tmp_path / "cache", **execution)
    assert len(stored(tmp_path / "cache")) == 2


def test_a_full_cache_keeps_both_kinds_of_one_job(
    tmp_path: Path, inputs: dict[str, Artifact]
) -> None:
    """Budget for half of the prefix: the reference takes its part of it, and pushes nothing out."""
    cache = tmp_path / "cache"
    train(tmp_path / "whole", inputs, KL | {"epochs": 1}, tmp_path / "other")
    (prefix,) = (tmp_path / "other").glob("prefix-*")
    half = (prefix / "hidden.bin").stat().st_size / 2e9
    for name in ("first", "second"):
        train(tmp_path / name, inputs, KL | {"epochs": 1}, cache, prefix_cache_gb=half)
        assert len(list(cache.glob("prefix-*"))) == len(stored(cache)) == 1
