"""Log-likelihoods of given tokens under a model: one forward, no sampling. Knows the decoder; knows no task and no file.

Legend: B rows, T tokens a row, N scored tokens, C hidden size, V vocabulary, G groups, S sequences.

Padding stands on the right, where causal attention cannot see it from any real token, so it changes no score. Scores of
one sequence in batches of another shape differ only by rounding, since matmul kernels are chosen by shape.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.core.errors import NonFiniteError
from llmctl.core.evals.tokens import Group
from llmctl.core.model import Decoder, KVCache

_LOGIT_ROWS = 256
"""Rows whose logits exist at once: 256 x 49,152 float32 are 50 MB."""
_CHUNK_TOKENS = 256
"""Continuations run together until they have so many tokens: few are padded, and the matrix products are still at their best."""


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
    longest = max(len(group.context) for group in groups)
    contexts = KVCache(model.config, num_slots=len(groups), capacity=longest, dtype=model.dtype, device=model.device)
    hidden = model.hidden(_padded([group.context for group in groups], model.device), cache=contexts)  # (G, T, C)
    owners = [index for index, group in enumerate(groups) for _ in group.continuations]  # the group of each of the S sequences
    continuations = [ids for group in groups for ids in group.continuations]
    starts = [len(groups[owner].context) for owner in owners]
    rows = [hidden[owner, start - 1 : start] for owner, start in zip(owners, starts, strict=True)]
    # The first token of each is predicted by its context; the others need the continuation itself, longest first.
    inner = sorted((i for i, ids in enumerate(continuations) if len(ids) > 1), key=lambda i: (-len(continuations[i]), i))
    if inner:
        cache = _fan_out(model, contexts, [owners[i] for i in inner], room=len(continuations[inner[0]]) - 1)
        tokens = [continuations[i][:-1] for i in inner]
        for i, inside in zip(inner, _go_on(model, cache, tokens, [starts[i] for i in inner]), strict=True):
            rows[i] = torch.cat([rows[i], inside])
    scores = iter(_scores(model, rows, continuations))
    return [[next(scores) for _ in group.continuations] for group in groups]


def _go_on(model: Decoder, cache: KVCache, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Iterator[Tensor]:
    """Hidden states (N_i, C) of `tokens[i]`, longest first, which slot i of the cache takes from position `starts[i]` on."""
    done = 0
    while done < len(tokens):
        length = len(tokens[done])
        part = slice(done, done + max(1, _CHUNK_TOKENS // length))
        slots = torch.arange(len(tokens))[part]
        steps = torch.arange(length)
        sizes, first = torch.tensor([len(ids) for ids in tokens[part]])[:, None], torch.tensor(starts[part])[:, None]
        positions = torch.where(steps < sizes, first + steps, -1)  # (B, T)
        hidden = model.hidden(_padded(tokens[part], model.device), positions=positions, cache=cache, slots=slots)  # (B, T, C)
        yield from (row[: len(ids)] for row, ids in zip(hidden, tokens[part], strict=True))
        done += len(slots)


def _fan_out(model: Decoder, contexts: KVCache, owners: Sequence[int], *, room: int) -> KVCache:
    """A cache whose slot i holds the context of group `owners[i]`, with `room` for more tokens.

    What lies behind a context is its padding: the positions of later tokens say so, and overwrite it before it is seen.
    """
    longest = contexts.capacity
    cache = KVCache(model.config, num_slots=len(owners), capacity=longest + room, dtype=model.dtype, device=model.device)
    source = torch.tensor(owners, device=model.device)
    for store, held in zip((*cache.keys, *cache.values), (*contexts.keys, *contexts.values), strict=True):
        store[:, :, :longest] = held[source]
    return cache


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
