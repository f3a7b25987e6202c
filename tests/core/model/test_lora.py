"""Adapters on the decoder's matrices: what they compute, what they learn, what they leave alone."""

import math

import pytest
import torch
from torch import Tensor

from llmctl.core.config import ModelConfig
from llmctl.core.model import Decoder
from llmctl.core.model.dropout import Dropout
from llmctl.core.model.facts import tensor_shapes, training_memory
from llmctl.core.model.lora import AdapterDropout, LoraConfig, adapter_tensors, add_adapters, num_adapter_parameters
from tests.core.model.tiny import SHAPE

FUSED = [("layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v"), ("layers.1.mlp.down",)]
TOKENS = torch.arange(24).reshape(2, 12) * 5 % 61


def tiny(*, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(ModelConfig(**SHAPE))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to(dtype)


def adapted(*, dtype: torch.dtype = torch.float32) -> Decoder:
    """With B as if it had been trained."""
    return with_dropout(dtype=dtype)[0]


def with_dropout(*, dtype: torch.dtype = torch.float32) -> tuple[Decoder, AdapterDropout]:
    model = tiny(dtype=dtype)
    dropout = add_adapters(model, FUSED, LoraConfig(rank=4, alpha=6.0), seed=3)
    model.to(dtype)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1, generator=draw)
    return model.eval(), dropout


def merged(model: Decoder) -> Decoder:
    """The plain decoder with W + alpha / r * B A, written out by hand."""
    state = model.state_dict()
    plain = {name: tensor.clone() for name, tensor in state.items() if name not in adapter_tensors(state)}
    for names in FUSED:
        a = state[f"{names[0]}.lora_a"]
        for name in names:
            plain[f"{name}.weight"] += 6.0 / 4 * state[f"{name}.lora_b"] @ a
    result = tiny(dtype=model.dtype)
    result.load_state_dict(plain)
    return result


def test_fresh_adapters_leave_every_logit_as_it_is() -> None:
    plain, model = tiny(), tiny()
    add_adapters(model, FUSED, LoraConfig(rank=4, alpha=8.0), seed=0)
    assert torch.equal(model(TOKENS), plain(TOKENS))


def test_merged_and_unmerged_compute_the_same() -> None:
    model = adapted()
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS), tiny()(TOKENS), atol=1e-2)
        torch.testing.assert_close(model(TOKENS), merged(model)(TOKENS), atol=2e-5, rtol=1e-5)
    exact = adapted(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(exact(TOKENS), merged(exact)(TOKENS), atol=1e-12, rtol=1e-12)


def test_gradients_are_those_of_the_merged_matrix_by_the_chain_rule() -> None:
    """dA = s B^T G and dB = s G A^T, where G is the gradient of the merged weight, found without adapters, in float64."""
    model = adapted(dtype=torch.float64)
    model(TOKENS).square().sum().backward()
    plain = merged(model)
    plain(TOKENS).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    found = dict(model.named_parameters())
    scale = 6.0 / 4
    for names in FUSED:
        a = found[f"{names[0]}.lora_a"]
        wanted_a: Tensor | float = 0.0
        for name in names:
            b, whole = found[f"{name}.lora_b"], gradients[f"{name}.weight"]
            assert whole is not None
            torch.testing.assert_close(b.grad, scale * whole @ a.detach().T, atol=1e-10, rtol=1e-10)
            wanted_a = wanted_a + scale * b.detach().T @ whole
        torch.testing.assert_close(a.grad, wanted_a, atol=1e-10, rtol=1e-10)


def test_only_adapters_are_trained_and_the_rest_keeps_its_names() -> None:
    model = adapted()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_tensors(model.state_dict()))
    assert set(model.state_dict()) - trained == set(tensor_shapes(model.config))
    shapes = [[tuple(tiny().get_parameter(f"{name}.weight").shape) for name in names] for names in FUSED]
    assert sum(model.get_parameter(name).numel() for name in trained) == num_adapter_parameters(shapes, 4)  # type: ignore[arg-type]


def test_a_is_drawn_as_peft_draws_it_and_follows_from_the_seed() -> None:
    first, second = adapted().state_dict(), adapted().state_dict()
    a = first["layers.0.attn.q.lora_a"]
    assert torch.equal(a, second["layers.0.attn.q.lora_a"])
    bound = 1 / math.sqrt(32)
    assert 0.9 * bound < a.abs().max() <= bound
    assert abs(float(a.mean())) < 0.2 * bound


def test_dropout_falls_on_samples_wherever_they_stand_and_only_in_training() -> None:
    """One call over two samples is the two alone; without gradients there is no dropout."""
    model, dropout = with_dropout()
    plain = model(TOKENS)
    dropout.now = Dropout(0.5, seed=1, samples=[7, 8])
    both = model(TOKENS)
    assert not torch.allclose(both, plain, atol=1e-3)
    for row, sample in enumerate((7, 8)):
        dropout.now = Dropout(0.5, seed=1, samples=[sample])
        torch.testing.assert_close(model(TOKENS[row : row + 1])[0], both[row], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_frozen_weights_take_no_masters_no_gradients_and_no_moments(compute_bytes: int) -> None:
    config = ModelConfig(**SHAPE)  # type: ignore[arg-type]
    total = sum(math.prod(shape) for shape in tensor_shapes(config).values())
    memory = training_memory(config, tokens_per_micro_batch=64, compute_bytes=compute_bytes, num_adapted=1000)
    assert memory.weight_bytes == total * compute_bytes + 1000 * 4 + (1000 * 2 if compute_bytes == 2 else 0)
    assert memory.gradient_bytes == 1000 * compute_bytes
    assert memory.optimizer_bytes == 1000 * 8
