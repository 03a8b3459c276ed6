"""Attention by document against PyTorch's with the block-diagonal mask of the whole pack."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model import documents
from pipeline.model.attention import VARLEN, borders, per_document, varlen
from pipeline.model.documents import SHORT
from pipeline.model.lora import LoraLinear
from pipeline.train.batches import MicroBatch
from pipeline.train.loss import SftModule

SHARED = 11
PACKS = {
    "one": [40],
    "several": [1, 7, 64, 33],
    "around the border": [SHORT - 1, SHORT, SHORT + 1],
    "long and short": [300, 5, 210],
    "many blocks": [700, 901],
}


def inputs(lengths: list[int], heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v laid out as transformers hands them over, and a gradient of the output."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    tokens = sum(lengths)
    made = [
        torch.randn(1, tokens, count, 16, generator=generator).to(dtype)
        for count in (heads, key_heads, key_heads, heads)
    ]
    return [t.transpose(1, 2).requires_grad_() for t in made[:3]] + [made[3]]


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None, :]).tril()
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    module = torch.nn.Identity()
    return per_document(module, q, k, v, None, scaling=0.25, document_starts=starts)[0]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_output_and_gradients_in_fp32(lengths: list[int], heads: int, key_heads: int) -> None:
    *tensors, by_output = inputs(lengths, heads, key_heads, torch.float32)
    want = expected(*tensors, lengths)
    wanted = [want, *torch.autograd.grad(want, tensors, by_output)]
    got = ours(*tensors, lengths)
    gotten = [got, *torch.autograd.grad(got, tensors, by_output)]
    for left, right in zip(gotten, wanted, strict=True):
        assert left.shape == right.shape
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_gradients_in_bf16_are_as_close_to_fp32_as_those_of_pytorch(lengths: list[int]) -> None:
    *tensors, by_output = inputs(lengths, 6, 2, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(expected(*exact, lengths), exact, by_output.float())
    theirs = torch.autograd.grad(expected(*tensors, lengths), tensors, by_output)
    mine = torch.autograd.grad(ours(*tensors, lengths), tensors, by_output)
    for true, their, own in zip(truth, theirs, mine, strict=True):
        assert (own.float() - true).norm() <= 1.5 * (their.float() - true).norm() + 1e-3


def test_blocks_of_few_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of models with many heads and long documents."""
    *tensors, by_output = inputs([250, 300], 6, 2, torch.float32)
    want = ours(*tensors, [250, 300])
    wanted = [want, *torch.autograd.grad(want, tensors, by_output)]
    monkeypatch.setattr(documents, "BLOCK_SCORES", 6 * 300 * 7)
    got = ours(*tensors, [250, 300])
    gotten = [got, *torch.autograd.grad(got, tensors, by_output)]
    for left, right in zip(gotten, wanted, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()


def test_without_starts_it_is_one_document() -> None:
    *tensors, _ = inputs([30], 4, 2, torch.float32)
    alone = per_document(torch.nn.Identity(), *tensors, None, scaling=0.25)[0]
    assert torch.equal(alone, ours(*tensors, [30]))


@pytest.mark.parametrize("shared", [SHARED, SHORT + 8])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_a_shared_beginning_gives_what_repeating_it_gives(lengths: list[int], shared: int) -> None:
    *tensors, by_output = inputs([shared, *lengths], 6, 2, torch.float32)
    starts = [shared, *(shared + sum(lengths[: i + 1]) for i in range(len(lengths)))]
    got = per_document(
        torch.nn.Identity(), *tensors, None, scaling=0.25, document_starts=torch.tensor(starts)
    )[0]
    beginning = torch.arange(shared)
    parts = [torch.cat([beginning, torch.arange(a, b)]) for a, b in itertools.pairwise(starts)]
    repeated = torch.cat(parts)
    alone = [shared + length for length in lengths]
    whole = expected(*(t[:, :, repeated] for t in tensors), alone)
    own = torch.cat([torch.arange(len(p)) + sum(alone[:i]) for i, p in enumerate(parts)])
    keep = torch.cat([beginning, own[(repeated >= shared)]])
    want = whole[:, keep]
    wanted = [want, *torch.autograd.grad(want, tensors, by_output)]
    gotten = [got, *torch.autograd.grad(got, tensors, by_output)]
    for left, right in zip(gotten, wanted, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_on_a_gpu_it_is_as_close_to_fp32_as_pytorch_with_a_mask(lengths: list[int]) -> None:
    device = torch.device("cuda")
    *tensors, by_output = (t.detach().to(device) for t in inputs(lengths, 6, 2, torch.bfloat16))
    tensors = [t.requires_grad_() for t in tensors]
    where = borders(torch.tensor([0, *lengths]).cumsum(0), device)
    got = varlen(nn.Identity(), *tensors, None, scaling=0.25, **where)[0]
    exact = [t.detach().float().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(expected(*exact, lengths), exact, by_output.float())
    theirs = torch.autograd.grad(expected(*tensors, lengths), tensors, by_output)
    mine = torch.autograd.grad(got, tensors, by_output)
    for true, their, own in zip(truth, theirs, mine, strict=True):
        assert (own.float() - true).norm() <= 1.5 * (their.float() - true).norm() + 1e-3


def test_the_borders_have_the_names_that_flash_attention_in_transformers_takes() -> None:
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    where = borders(torch.tensor([0, 5, 12]), torch.device("meta"))
    assert where.keys() <= inspect.signature(_flash_attention_forward).parameters.keys()
    assert where["max_length_q"] == where["max_length_k"] == 7
    assert where["cu_seq_lens_q"].dtype == torch.int32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_as_on_a_gpu_has_the_right_shapes_dtypes_and_devices(checkpointing: bool) -> None:
    """On the meta device, which knows FlashAttention's kernel as a GPU's tensors would meet it."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register(VARLEN, varlen)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    config = AutoConfig.for_model("qwen2", **sizes, **heads)
    meta = torch.device("meta")
    with meta:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation(VARLEN)
    mlp = model.requires_grad_(False).model.layers[1].mlp
    mlp.up_proj = LoraLinear(mlp.up_proj, torch.ones(1, 64), torch.ones(96, 1), 2.0, 0.0)
    mlp.up_proj.to(meta)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    ids = torch.arange(12)[None]
    at, starts = torch.tensor([2, 3, 8]), torch.tensor([0, 5, 12])
    states = torch.zeros(1, 12, 64, dtype=torch.bfloat16)
    batch = MicroBatch(ids, ids, at, at, torch.ones(3), at - at - 1, starts, states)
    loss, *_ = SftModule(model.train())(batch.to(meta))
    assert (loss.device, loss.dtype, loss.shape) == (meta, torch.float32, ())
    loss.backward()
    adapter = mlp.up_proj
    assert adapter.lora_A.grad.shape == (1, 64) and adapter.lora_B.grad.dtype == torch.float32
