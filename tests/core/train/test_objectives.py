"""The chunked cross-entropy against torch's, in float64."""

import pytest
import torch
import torch.nn.functional as F

from llmctl.core.config import ModelConfig
from llmctl.core.data.loader import IGNORE, Batch
from llmctl.core.model import Decoder
from llmctl.core.train.objectives import NextToken, Penalty, head_loss, token_losses


def make_model(**facts: object) -> Decoder:
    config = ModelConfig(
        **{  # type: ignore[arg-type]
            "vocab_size": 97,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_size": 24,
            "max_positions": 32,
            "initializer_range": 0.5,
            **facts,
        }
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(3))
    return model.double()


@pytest.mark.parametrize(
    "facts",
    [{}, {"tie_embeddings": True}, {"head_bias": True}, {"logit_softcap": 3.0, "logit_multiplier": 0.7, "head_bias": True}],
    ids=["plain", "tied", "bias", "soft-cap"],
)
@pytest.mark.parametrize("num_rows", [1, 130, 2500], ids=["one row", "two scratches", "three chunks"])
def test_loss_and_gradients_equal_those_of_torch(facts: dict[str, object], num_rows: int) -> None:
    model = make_model(**facts)
    if model.head.bias is not None:
        torch.nn.init.normal_(model.head.bias)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_rows, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (num_rows,), generator=generator)
    targets[::3] = IGNORE
    wanted = F.cross_entropy(model.logits(hidden), targets, ignore_index=IGNORE, reduction="sum") * 0.37
    inputs = [hidden, *(p for n, p in model.named_parameters() if n.startswith(("head", "embed")))]
    wanted_gradients = torch.autograd.grad(wanted, inputs, allow_unused=True, materialize_grads=True)

    got = head_loss(model, hidden, targets, scale=0.37)
    got_gradients = torch.autograd.grad(got, inputs, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(got_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 0.05)])
def test_smoothing_and_z_loss_equal_their_formulas(smoothing: float, z_loss: float, softcap: float | None) -> None:
    model = make_model(logit_softcap=softcap, logit_multiplier=1.3)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (300,), generator=generator)
    targets[::5] = IGNORE
    logits = model.logits(hidden)
    squares = logits.logsumexp(1).square()[targets != IGNORE].sum()
    wanted = 0.2 * (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing) + z_loss * squares)
    got = head_loss(model, hidden, targets, scale=0.2, penalty=Penalty(label_smoothing=smoothing, z_loss=z_loss))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    inputs = [hidden, model.head.weight]
    for ours, theirs in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_gradient_follows_what_is_done_with_the_loss() -> None:
    model = make_model()
    hidden = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(5)
    (plain,) = torch.autograd.grad(head_loss(model, hidden, targets, scale=1.0), hidden)
    (tripled,) = torch.autograd.grad(3.0 * head_loss(model, hidden, targets, scale=1.0), hidden)
    torch.testing.assert_close(tripled, 3.0 * plain)


def test_token_losses_equal_those_of_torch_and_are_zero_where_ignored() -> None:
    model = make_model(logit_softcap=2.0)
    hidden = torch.randn(3, 500, 16, dtype=torch.float64)
    targets = torch.randint(0, 97, (3, 500))
    targets[0, :7] = IGNORE
    wanted = F.cross_entropy(model.logits(hidden).view(-1, 97), targets.view(-1), ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(token_losses(model, hidden, targets), wanted.detach())


def test_bf16_loss_is_that_of_its_own_logits() -> None:
    model = make_model().bfloat16()
    hidden = torch.randn(300, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 97, (300,))
    wanted = F.cross_entropy(model.logits(hidden).float(), targets)
    (wanted_gradient,) = torch.autograd.grad(wanted, hidden)
    got = head_loss(model, hidden, targets, scale=1 / 300)
    (got_gradient,) = torch.autograd.grad(got, hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_gradient, wanted_gradient, rtol=0.05, atol=1e-4)


def test_next_token_is_the_mean_over_all_counted_targets() -> None:
    model = make_model()
    tokens = torch.randint(0, 97, (2, 20))
    targets = torch.randint(0, 97, (2, 20))
    targets[1, 5:] = IGNORE
    objective = NextToken()
    batch = Batch(tokens, targets)
    assert objective.weight_of(batch) == 25
    got = objective.loss(model, batch, total_weight=25)
    wanted = F.cross_entropy(model(tokens).view(-1, 97), targets.view(-1), ignore_index=IGNORE)
    torch.testing.assert_close(got, wanted)
