"""Log-likelihoods of given tokens under a model: one forward, no sampling. Knows the decoder; knows no task and no file.

Legend: B rows, T tokens a row, N scored tokens, C hidden size, V vocabulary, G groups, S sequences.

Padding stands on the right, where causal attention cannot see it from any real token, so it changes no score. Scores of
one sequence in batches of another shape differ only by rounding, since matmul kernels are chosen by shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.core.errors import NonFiniteError
from llmctl.core.evals.tokens import Group
from llmctl.core.model import Decoder, KVCache

_LOGIT_ROWS = 256
"""Rows whose logits exist at once: 256 x 49,152 float32 are 50 MB."""


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of one continuation: natural-log probabilities, and whether each is the likeliest."""

    log_probabilities: Tensor
    """(N,) float64 on the CPU."""
    likeliest: Tensor
    """(N,) bool on the CPU."""

    @property
    def log_likelihood(self) -> float:
        """Sum over the continuation, in nats."""
        return float(self.log_probabilities.sum())

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would have written just this."""
        return bool(self.likeliest.all())


@torch.no_grad()
def score_sequences(model: Decoder, sequences: Sequence[Sequence[int]], num_scored: Sequence[int]) -> list[TokenScores]:
    """Scores of the last `num_scored[i]` tokens of each sequence given all before them, in one batch.

    Each sequence has at least one token more than are scored. Raises NonFiniteError.
    """
    inputs = [sequence[:-1] for sequence in sequences]
    hidden = model.hidden(_padded(inputs, model.device))  # (B, T, C)
    rows = [hidden[row, len(ids) - count : len(ids)] for row, (ids, count) in enumerate(zip(inputs, num_scored, strict=True))]
    targets = [sequence[len(sequence) - count :] for sequence, count in zip(sequences, num_scored, strict=True)]
    return _scores(model, rows, targets)


@torch.no_grad()
def score_groups(model: Decoder, groups: Sequence[Group]) -> list[list[TokenScores]]:
    """Scores of each group's continuations after its context, in one batch. Raises NonFiniteError.

    Where groups have several continuations, each context is computed once and its keys and values are shared.
    """
    if all(len(group.continuations) == 1 for group in groups):
        sequences = [(*group.context, *group.continuations[0]) for group in groups]
        return [[scores] for scores in score_sequences(model, sequences, [len(group.continuations[0]) for group in groups])]
    counts = [len(group.continuations) for group in groups]
    longest = max(len(group.context) for group in groups)
    continuations = [ids for group in groups for ids in group.continuations]
    more = max(len(ids) for ids in continuations) - 1
    capacity = longest + more
    cache = KVCache(model.config, num_slots=len(continuations), capacity=capacity, dtype=model.dtype, device=model.device)
    firsts = torch.tensor([sum(counts[:index]) for index in range(len(groups))])  # the slot of each group's first sequence
    after_context = model.hidden(_padded([group.context for group in groups], model.device), cache=cache, slots=firsts)  # (G, T, C)
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(counts))  # (S,) the group of each sequence
    lengths = [len(groups[index].context) for index in owner.tolist()]
    rows = [after_context[index, length - 1 : length] for index, length in zip(owner.tolist(), lengths, strict=True)]
    if more > 0:
        source = firsts[owner].to(model.device)
        for store in (*cache.keys, *cache.values):
            # What lies behind a context is its padding; the positions say so, and it is overwritten before it is seen.
            store[:, :, :longest] = store[source, :, :longest]
        steps = torch.arange(more)
        left = torch.tensor([len(ids) - 1 for ids in continuations])[:, None]
        positions = torch.where(steps < left, torch.tensor(lengths)[:, None] + steps, -1)  # (S, T)
        tokens = _padded([ids[:-1] for ids in continuations], model.device)
        inside = model.hidden(tokens, positions=positions, cache=cache)  # (S, T, C)
        rows = [torch.cat([row, inside[slot, : len(ids) - 1]]) for slot, (row, ids) in enumerate(zip(rows, continuations, strict=True))]
    scores = iter(_scores(model, rows, continuations))
    return [[next(scores) for _ in group.continuations] for group in groups]


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) ids, filled up on the right with 0."""
    tokens = torch.zeros(len(sequences), max(len(ids) for ids in sequences), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens.to(device)


def _scores(model: Decoder, rows: Sequence[Tensor], targets: Sequence[Sequence[int]]) -> list[TokenScores]:
    """From the hidden states (N_i, C) that predict `targets[i]` to their scores."""
    hidden = torch.cat(list(rows))  # (N, C)
    wanted = torch.tensor([token for ids in targets for token in ids], device=hidden.device)  # (N,)
    values, likeliest = [], []
    for start in range(0, len(wanted), _LOGIT_ROWS):
        logits = model.logits(hidden[start : start + _LOGIT_ROWS])  # (rows, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = wanted[start : start + _LOGIT_ROWS]
        chosen = logits.gather(1, ids[:, None]).squeeze(1)
        values.append((chosen - logits.logsumexp(1)).double().cpu())
        likeliest.append((logits.argmax(1) == ids).cpu())
    log_probabilities = torch.cat(values)
    if not bool(torch.isfinite(log_probabilities).all()):
        raise NonFiniteError("the model's logits are not finite (NaN or infinite): its weights are broken or overflow in this --dtype")
    sizes = [len(ids) for ids in targets]
    pairs = zip(torch.split(log_probabilities, sizes), torch.split(torch.cat(likeliest), sizes), strict=True)
    return [TokenScores(value, best) for value, best in pairs]
