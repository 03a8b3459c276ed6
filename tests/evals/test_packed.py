"""Packed linear layers against the plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parts import make_model

from pipeline.evals.generate import Request, generate
from pipeline.evals.packed import pack_linears
from pipeline.model.base import load_model

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (1, 1), (7, 5), (2, 33, 4)])
def test_the_sums_are_those_in_double_precision(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias)
    x = torch.randn(*shape, 48)
    want = layer.double()(x.double())
    layer.float()
    assert pack_linears(layer) == 1
    with torch.inference_mode():
        got = layer(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_answers_alike(tmp_path: Path, architecture: str, tied: bool) -> None:
    make_model(tmp_path, architecture, num_hidden_layers=2, tie_word_embeddings=tied)
    plain, packed = (load_model(tmp_path, torch.float32) for _ in range(2))
    assert pack_linears(packed) == 2 * 7 + 1
    ids = torch.randint(600, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = plain(ids).logits, packed(ids).logits
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    asked = [Request(str(i), row.tolist()[: 5 + 7 * i], 20) for i, row in enumerate(ids)]
    options = {"end_ids": {7}, "batch_rows": 2}
    assert generate(packed, asked, **options) == generate(plain, asked, **options)


@needs_onednn
def test_what_only_a_linear_layer_used_is_freed_and_reads_as_nan(tmp_path: Path) -> None:
    make_model(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    model = load_model(tmp_path, torch.float32)
    embedding = model.get_input_embeddings().weight.clone()
    pack_linears(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    up = model.model.layers[0].mlp.up_proj.weight
    assert up.shape == (128, 64)
    assert up.untyped_storage().nbytes() == 4
    assert bool(up.isnan().all())


def test_other_dtypes_are_left_alone() -> None:
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    before = layer.weight.clone()
    assert pack_linears(layer) == 0
    assert torch.equal(layer.weight, before)
