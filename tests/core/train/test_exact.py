"""The loss of a run does not depend on how its steps are cut up: micro-batches, accumulation, packing."""

from collections.abc import Callable, Sequence

import pytest
import torch

from llmctl.core.config import ModelConfig
from llmctl.core.data.loader import IGNORE, Batch
from llmctl.core.distributed.ranks import Ranks
from llmctl.core.model import Decoder
from llmctl.core.train.gradients import Gradients
from llmctl.core.train.objectives import NextToken, Penalty
from llmctl.core.train.optim import MasterOptimizer, OptimConfig
from llmctl.core.train.parallel import Alone
from llmctl.core.train.profile import Profile

STEPS, ROWS, LENGTH, VOCAB = 20, 8, 48, 61
CPU = torch.device("cpu")
WITHIN = {torch.float64: 1e-10, torch.float32: 1e-4}


def losses(
    batch_of: Callable[[int], Batch], *, dtype: torch.dtype, micro: int, objective: NextToken | None = None, kind: str = "adamw"
) -> torch.Tensor:
    """The loss of each of 20 steps, as the loop computes it, and that after the last: float64 (21,)."""
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=24, max_positions=LENGTH,
        qk_norm=True, tie_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hidden = [n for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2]
    # the rate is that of a real run; AdamW divides by the root of the squared gradient, and eps keeps that from being all rounding
    optim = OptimConfig(kind=kind, learning_rate=3e-3, eps=1e-6)  # type: ignore[arg-type]
    optimizer = MasterOptimizer(model, optim, hidden_matrices=hidden, compute_dtype=dtype, master_dtype=dtype)
    objective = objective or NextToken()
    parallel = Alone(model, objective)
    profile = Profile(CPU, on=False)
    gradients = Gradients(parallel, objective, optimizer, ranks=Ranks(), device=CPU, micro_batch_size=micro, profile=profile)
    found = []
    for step in range(STEPS + 1):
        made = gradients.of(batch_of(step), lambda: None)
        assert made is not None
        found.append(made[0].double())
        optimizer.clip()
        optimizer.step(lr_scale=1.0)
    return torch.stack(found)


def windows(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 3, (ROWS, LENGTH + 1), generator=generator).cumsum(1) % VOCAB  # a text that can be learnt
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORE  # micro-batches count differently many
    return Batch(tokens[:, :-1].contiguous(), targets, first_sample=step * ROWS)


@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "with everything"])
def test_micro_batches_change_nothing_but_rounding(dtype: torch.dtype, everything: bool) -> None:
    objective = NextToken(penalty=Penalty(label_smoothing=0.1, z_loss=1e-3), dropout=0.2, seed=5) if everything else None
    whole = losses(windows, dtype=dtype, micro=ROWS, objective=objective)
    assert whole[-1] < whole[0]
    for micro in (4, 3, 1):
        again = losses(windows, dtype=dtype, micro=micro, objective=objective)
        torch.testing.assert_close(again, whole, rtol=WITHIN[dtype], atol=0)


@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
def test_packing_changes_nothing_but_rounding(dtype: torch.dtype) -> None:
    """The same documents a step, one a row, side by side, and side by side from the last to the first."""

    def documents(step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randint(0, VOCAB, (length,), generator=generator) for length in (31, 17, 40, 2, 8, 48, 23, 25, 5, 9)]

    alone = losses(lambda step: packed([[d] for d in documents(step)]), dtype=dtype, micro=16)
    for micro in (16, 2):
        for order in (1, -1):
            side_by_side = losses(lambda step, o=order: packed(filled(documents(step)[::o])), dtype=dtype, micro=micro)  # type: ignore[misc]
            torch.testing.assert_close(side_by_side, alone, rtol=WITHIN[dtype], atol=0)


def filled(documents: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Rows filled one after the other."""
    rows: list[list[torch.Tensor]] = [[]]
    for document in documents:
        if sum(map(len, rows[-1])) + len(document) > LENGTH:
            rows.append([])
        rows[-1].append(document)
    return rows


def packed(rows: Sequence[Sequence[torch.Tensor]]) -> Batch:
    """Each row's documents and padding without a loss, which counts as a document."""
    tokens = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    targets = torch.full((len(rows), LENGTH), IGNORE)
    lengths = []
    for row, documents in enumerate(rows):
        place = 0
        for document in documents:
            tokens[row, place : place + len(document)] = document
            targets[row, place : place + len(document) - 1] = document[1:]
            place += len(document)
        lengths.append((*map(len, documents), LENGTH - place))
    return Batch(tokens, targets, tuple(lengths))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_muon_keeps_that_in_the_dtype_of_its_iteration(dtype: torch.dtype, within: float) -> None:
    """Where the CPU multiplies in bf16 the iteration runs in it, and what that leaves is in docs/pretrain.md."""
    whole = losses(windows, dtype=dtype, micro=ROWS, kind="muon")
    torch.testing.assert_close(losses(windows, dtype=dtype, micro=2, kind="muon"), whole, rtol=within, atol=0)
