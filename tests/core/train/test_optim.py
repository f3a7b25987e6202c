"""Muon against torch's, AdamW over masters against torch's, schedules against torch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmctl.core.config import ModelConfig
from llmctl.core.data.loader import Batch
from llmctl.core.errors import InputError
from llmctl.core.model import Decoder
from llmctl.core.train.muon import COEFFICIENTS, muon_step, orthogonalize
from llmctl.core.train.objectives import NextToken
from llmctl.core.train.optim import MasterOptimizer, OptimConfig
from llmctl.core.train.schedule import Schedule, lr_scale


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_equals_that_of_torch_up_to_bf16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for _ in range(3)]
    theirs = [nn.Parameter(m.clone()) for m in matrices]
    ours, buffers = torch.stack(matrices), torch.zeros(3, *shape)
    optimizer = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(5):
        gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        muon_step(ours, torch.stack(gradients), buffers, learning_rate=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    for i, parameter in enumerate(theirs):
        moved, apart = (parameter - matrices[i]).norm(), (parameter - ours[i]).norm()
        assert apart / moved < 0.02  # bf16 keeps 8 bits, and the two sum in another order
        torch.testing.assert_close(buffers[i], optimizer.state[parameter]["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (2, 32, 40), (2, 24, 24)])
@pytest.mark.parametrize("rank", [None, 1, 5])
def test_orthogonalize_in_float32_equals_the_iteration_written_out(shape: tuple[int, ...], rank: int | None) -> None:
    """Of long matrices it goes over the Gram matrix; of ones without full rank too, as a gradient of few tokens is."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64, generator=generator)
    if rank is not None:
        left, right = torch.randn(shape[0], shape[1], rank, generator=generator), torch.randn(shape[0], rank, shape[2], generator=generator)
        matrices = (left @ right).double()
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        x = a * x + b * (x @ x.mT @ x) + c * (x @ x.mT @ x @ x.mT @ x)
    torch.testing.assert_close(orthogonalize(matrices.float(), dtype=torch.float32).double(), x, rtol=0, atol=3e-5)


@pytest.mark.parametrize("shape", [(2, 12, 30), (2, 30, 12)])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices, dtype=torch.float64)
    for before, after in zip(matrices, result, strict=True):
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vh.T
        values = inner.diagonal()
        torch.testing.assert_close(inner, torch.diag(values), rtol=0, atol=1e-9)
        assert values.min() > 0.5
        assert values.max() < 1.5


def make_model(seed: int = 0) -> Decoder:
    config = ModelConfig(
        vocab_size=61, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_positions=32, qk_norm=True,
        initializer_range=0.2,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def hidden_matrices(model: nn.Module) -> list[str]:
    return [n for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2]


def make_batch(step: int, rows: int = 8) -> Batch:
    tokens = torch.randint(0, 61, (rows, 13), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def train(model: Decoder, optimizer: MasterOptimizer, *, steps: int, micro: int) -> None:
    objective = NextToken()
    for step in range(steps):
        batch = make_batch(step)
        optimizer.zero_gradients()
        for start in range(0, 8, micro):
            part = Batch(batch.tokens[start : start + micro], batch.targets[start : start + micro])
            objective.loss(model, part, total_weight=objective.weight_of(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.collect()
        optimizer.clip()
        optimizer.step(lr_scale=1.0)


def test_adamw_alone_equals_torch_with_clipping_and_decay_on_matrices_only() -> None:
    ours, theirs = make_model().double(), make_model().double()
    config = OptimConfig(kind="adamw", learning_rate=1e-2, weight_decay=0.3, clip=0.5)
    optimizer = MasterOptimizer(
        ours, config, hidden_matrices=hidden_matrices(ours), compute_dtype=torch.float64, master_dtype=torch.float64
    )
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(20):
        batch = make_batch(step)
        reference.zero_grad()
        F.cross_entropy(theirs(batch.tokens).view(-1, 61), batch.targets.view(-1)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    train(ours, optimizer, steps=20, micro=8)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("adamw", torch.float64, 1e-10), ("muon", torch.float64, 1e-9), ("adamw", torch.float32, 1e-4), ("muon", torch.float32, 1e-3)],
)
def test_the_result_does_not_depend_on_the_micro_batch_split(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Twenty steps. AdamW divides by the root of the squared gradient, so where a gradient is all rounding the step is too."""
    results = []
    for micro in (8, 4, 1):
        model = make_model().to(dtype)
        config = OptimConfig(kind=kind, learning_rate=1e-3, eps=1e-6)  # type: ignore[arg-type]
        optimizer = MasterOptimizer(model, config, hidden_matrices=hidden_matrices(model), compute_dtype=dtype, master_dtype=dtype)
        train(model, optimizer, steps=20, micro=micro)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in results[1:]:
        assert (other - results[0]).abs().max() / results[0].abs().max() < tolerance


def test_bf16_weights_are_rounded_masters_and_small_updates_are_not_lost() -> None:
    model = make_model()
    config = OptimConfig(kind="adamw", learning_rate=1e-6, weight_decay=0.0)
    optimizer = MasterOptimizer(model, config, hidden_matrices=(), compute_dtype=torch.bfloat16)
    before = {n: m.clone() for n, m in optimizer.masters.items()}
    train(model, optimizer, steps=5, micro=4)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.detach(), optimizer.masters[name].bfloat16(), rtol=0, atol=0)
    moved = (optimizer.masters["layers.0.mlp.up.weight"] - before["layers.0.mlp.up.weight"]).abs()
    assert 1e-6 < moved.max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restored_into_a_new_optimizer_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    def fresh(seed: int) -> tuple[Decoder, MasterOptimizer]:
        model = make_model(seed)
        return model, MasterOptimizer(model, OptimConfig(), hidden_matrices=hidden_matrices(model), compute_dtype=dtype)

    model, optimizer = fresh(0)
    train(model, optimizer, steps=3, micro=4)
    weights = copy.deepcopy(optimizer.masters)
    state = copy.deepcopy(optimizer.state_tensors())
    other_model, other = fresh(1)
    other.load(weights=weights, state=state, num_updates=3, where="here")
    for m, o in ((model, optimizer), (other_model, other)):
        train(m, o, steps=2, micro=4)
    for name in optimizer.masters:
        assert torch.equal(optimizer.masters[name], other.masters[name]), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, other.state_tensors()[name]), name


def test_state_that_does_not_fit_is_named() -> None:
    model = make_model()
    optimizer = MasterOptimizer(model, OptimConfig(), hidden_matrices=hidden_matrices(model), compute_dtype=torch.float32)
    state = optimizer.state_tensors()
    weights = dict(optimizer.masters)
    name = "layers.0.mlp.up.weight.momentum"
    with pytest.raises(InputError, match=name):
        optimizer.load(weights=weights, state={k: v for k, v in state.items() if k != name}, num_updates=0, where="x")
    with pytest.raises(InputError, match="shape"):
        optimizer.load(weights=weights, state={**state, name: torch.zeros(3)}, num_updates=0, where="x")


def test_steps_that_only_measure_leave_nothing_behind() -> None:
    model = make_model()
    optimizer = MasterOptimizer(model, OptimConfig(), hidden_matrices=hidden_matrices(model), compute_dtype=torch.float32)
    before = copy.deepcopy(optimizer.masters)
    objective, batch = NextToken(), make_batch(0)
    objective.loss(model, batch, total_weight=96).backward()  # type: ignore[no-untyped-call]
    optimizer.collect()
    optimizer.clip()
    optimizer.step(lr_scale=0.0)
    optimizer.forget()
    assert optimizer.num_updates == 0
    assert all(torch.equal(before[n], m) for n, m in optimizer.masters.items())
    assert all(not t.any() for t in optimizer.state_tensors().values())


def test_a_schedule_warms_up_on_a_line_and_then_follows_the_cosine_of_torch() -> None:
    schedule = Schedule(num_steps=50, warmup_steps=10, kind="cosine", final_fraction=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    assert [lr_scale(s, schedule) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for step in range(10, 50):
        assert lr_scale(step, schedule) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_a_linear_schedule_falls_by_equal_amounts_and_never_trains_at_zero() -> None:
    schedule = Schedule(num_steps=10, kind="linear")
    assert [lr_scale(s, schedule) for s in range(10)] == pytest.approx([1 - s / 10 for s in range(10)])


def test_wsd_stays_at_the_peak_and_falls_over_the_last_part() -> None:
    schedule = Schedule(num_steps=20, warmup_steps=2, kind="wsd", decay_fraction=0.25, final_fraction=0.0)
    scales = [lr_scale(s, schedule) for s in range(20)]
    assert scales == pytest.approx([0.5, 1.0, *[1.0] * 14, 0.8, 0.6, 0.4, 0.2])
