"""The explicit causal attention of CPU training against torch's own kernel in float64."""

import pytest
import torch
import torch.nn.functional as F

from llmctl.core.model.attention import Pattern, attend
from llmctl.core.model.causal import causal_attention
from llmctl.core.model.causal_native import can_run, native_attention


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("window", [None, 1, 7, 128, 200, 1000])
def test_shared_keys_and_windows_equal_the_reference(heads: int, shared: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(heads)
    shapes = [(2, 300, heads, 8), (2, 300, shared, 8), (2, 300, shared, 8), (2, 300, heads, 8)]
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]  # as the decoder makes them
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    exact = [t.double().requires_grad_() for t in tensors[:3]]
    places = torch.arange(300)
    seen = places[None] <= places[:, None]
    if window is not None:
        seen &= places[None] > places[:, None] - window
    ours = causal_attention(q, k, v, scale=0.3, window=window)
    reference = F.scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.3, enable_gqa=True)
    ours.backward(tensors[3])
    reference.backward(tensors[3].double())
    torch.testing.assert_close(ours.double(), reference, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-5, rtol=1e-5)


def test_attention_in_training_takes_it_with_windows_and_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 256, 8, generator=generator)
    k, v = torch.randn(2, 2, 256, 8, generator=generator), torch.randn(2, 2, 256, 8, generator=generator)
    for pattern in (Pattern(), Pattern(document_lengths=((256,), (130, 126)))):
        for window in (None, 40):
            trained = attend(q.clone().requires_grad_(), k, v, pattern, scale=0.3, window=window)
            with torch.no_grad():
                plain = attend(q, k, v, pattern, scale=0.3, window=window)
            torch.testing.assert_close(trained, plain, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65, 200, 256, 257, 300, 512])
def test_values_and_gradients_equal_the_reference(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    tensors = [torch.randn(2, 3, num_tokens, 16, generator=generator) for _ in range(4)]
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    exact = [t.double().requires_grad_() for t in tensors[:3]]
    ours = causal_attention(q, k, v, scale=0.3)
    reference = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3)
    ours.backward(tensors[3])
    reference.backward(tensors[3].double())
    torch.testing.assert_close(ours.double(), reference, atol=2e-6, rtol=1e-5)
    for mine, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=5e-6, rtol=1e-5)


def test_bf16_stays_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 130, 32, generator=generator).bfloat16() for _ in range(3))
    reference = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    difference = (causal_attention(q, k, v, scale=32**-0.5).double() - reference).abs().max()
    assert difference < 0.03  # bf16 holds 8 bits; values are about 1


@pytest.mark.parametrize(("heads", "shared", "size"), [(6, 2, 16), (4, 1, 48), (3, 3, 64)])
@pytest.mark.parametrize(
    ("num_tokens", "window"), [(1, None), (2, None), (47, 5), (48, 1), (49, None), (100, 1000), (130, 48), (300, None), (300, 200)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_native_attention_equals_the_reference(
    heads: int, shared: int, size: int, num_tokens: int, window: int | None, threads: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(2, num_tokens, n, size) for n in (heads, shared, shared, heads)]
    tensors = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    if not can_run(tensors[0], tensors[2]):
        pytest.skip("the native library was not built, or the CPU lacks AVX2")
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    exact = [t.double().requires_grad_() for t in tensors[:3]]
    places = torch.arange(num_tokens)
    seen = places[None] <= places[:, None]
    if window is not None:
        seen &= places[None] > places[:, None] - window
    reference = F.scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.3, enable_gqa=True)
    reference.backward(tensors[3].double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = native_attention(q, k, v, scale=0.3, window=window)
        ours.backward(tensors[3])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours.double(), reference, atol=5e-6, rtol=1e-5)
    for mine, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=2e-5, rtol=1e-5)


def test_native_attention_gives_the_same_bits_with_any_threads_and_any_rows() -> None:
    q, k, v, grad = (torch.randn(4, 3, 150, 32, generator=torch.Generator().manual_seed(i)) for i in range(4))
    if not can_run(q, v):
        pytest.skip("the native library was not built, or the CPU lacks AVX2")

    def run(rows: slice, threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            inputs = [x[rows].clone().requires_grad_() for x in (q, k, v)]
            out = native_attention(*inputs, scale=0.2)
            out.backward(grad[rows])
        finally:
            torch.set_num_threads(before)
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    whole = run(slice(0, 4), 2)
    for one, other in zip(whole, run(slice(0, 4), 1), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole, run(slice(2, 3), 1), strict=True):
        assert torch.equal(one[2:3], other)


def test_large_scores_and_scores_that_are_not_finite() -> None:
    q, k, v = (torch.randn(1, 1, 70, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    if not can_run(q, v):
        pytest.skip("the native library was not built, or the CPU lacks AVX2")
    large = (q * 300).double()
    reference = F.scaled_dot_product_attention(large, k.double(), v.double(), is_causal=True, scale=1.0)
    torch.testing.assert_close(native_attention(q * 300, k, v, scale=1.0).double(), reference, atol=2e-3, rtol=1e-3)
    q[0, 0, 40, 3] = float("nan")
    out = native_attention(q, k, v, scale=1.0)
    assert bool(out[0, 0, 40].isnan().all())  # training stops at a loss that is not finite: it must get there
    assert bool(out[0, 0, :40].isfinite().all())
