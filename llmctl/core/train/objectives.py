"""Training objectives: from a batch to a loss whose gradient is summed over micro-batches. Knows the decoder's head.

Shapes: R rows (tokens of a micro-batch), C hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmctl.core.data.loader import IGNORE, Batch
from llmctl.core.model import Decoder
from llmctl.core.model.dropout import Dropout
from llmctl.core.model.lora import AdapterDropout

_MATMUL_ROWS = 1024
"""Rows whose logits exist at once, in the compute dtype."""
_SCRATCH_ROWS = 128
"""Rows that are float32 at once: at 8k entries 4 MB, which stays in a cache; 33 MB temporaries cost 13 % of a step."""


class Objective(Protocol):
    """What a loop minimises: the mean over all counted tokens of the global batch."""

    def weight_of(self, batch: Batch) -> float:
        """What `batch` counts for in the mean: its number of tokens with a loss."""
        ...

    def loss(self, model: Decoder, batch: Batch, *, total_weight: float) -> Tensor:
        """The batch's part of the mean: a 0-d tensor with gradient. Summed over micro-batches it is the step's loss."""
        ...


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """What is added to the cross-entropy of a token, so that the loss in training is not that of an evaluation.

    `label_smoothing` E trains towards 1 - E for the target and E spread over the whole vocabulary, as torch's (Szegedy et
    al. 2016). `z_loss` adds so many times the square of the log of softmax's denominator (PaLM, Chowdhery et al. 2022,
    section 5), which keeps logits from drifting.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


NO_PENALTY = Penalty()


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Cross-entropy of the next token, in nats, over the targets that are not IGNORE; see Penalty for what may be added.

    `dropout` leaves out that part of what each layer adds, by `seed` and the number of the sample.
    """

    penalty: Penalty = NO_PENALTY
    dropout: float = 0.0
    seed: int = 0

    def weight_of(self, batch: Batch) -> float:
        """Number of targets with a loss."""
        return float((batch.targets != IGNORE).sum())

    def loss(self, model: Decoder, batch: Batch, *, total_weight: float) -> Tensor:
        """Sum of the token losses over `total_weight`."""
        samples = range(batch.first_sample, batch.first_sample + batch.tokens.size(0))
        dropout = Dropout(self.dropout, seed=self.seed, samples=samples) if self.dropout else None
        hidden = model.hidden(batch.tokens, document_lengths=batch.document_lengths, dropout=dropout)  # (B, T, C)
        return head_loss(model, hidden, batch.targets, scale=1.0 / total_weight, penalty=self.penalty)


@dataclass(frozen=True, kw_only=True)
class AdapterNextToken:
    """NextToken of a model whose adapters leave out the part `rate` of their inputs, by `seed` and the number of the sample."""

    dropout: AdapterDropout
    rate: float
    seed: int

    def weight_of(self, batch: Batch) -> float:
        """See NextToken."""
        return NextToken().weight_of(batch)

    def loss(self, model: Decoder, batch: Batch, *, total_weight: float) -> Tensor:
        """See NextToken."""
        samples = range(batch.first_sample, batch.first_sample + batch.tokens.size(0))
        self.dropout.now = Dropout(self.rate, seed=self.seed, samples=samples)
        return NextToken().loss(model, batch, total_weight=total_weight)


@dataclass(frozen=True)
class Head:
    """The output head's arithmetic: softcap(multiplier * (h W^T + b))."""

    weight: Tensor
    bias: Tensor | None
    multiplier: float
    softcap: float | None


def head_loss(model: Decoder, hidden: Tensor, targets: Tensor, *, scale: float, penalty: Penalty = NO_PENALTY) -> Tensor:
    """`scale` times the summed cross-entropy of `targets` (any shape, IGNORE = none) under the model's head.

    Rows without a target do not reach the head: with masked prompts they are half of them, and the head a fifth of the work.
    """
    head = head_of(model)
    rows, flat = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)  # (R, C), (R,)
    counted = flat != IGNORE
    if not bool(counted.all()):
        places = counted.nonzero().squeeze(1)
        rows, flat = rows.index_select(0, places), flat.index_select(0, places)
    result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, head.weight, head.bias, flat, head, scale, penalty
    )
    return result


@torch.no_grad()
def token_losses(model: Decoder, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, float32 (R,), 0 where IGNORE. No gradient."""
    head = head_of(model)
    rows, flat = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    losses = torch.zeros(rows.size(0), dtype=wide, device=rows.device)
    for start in range(0, rows.size(0), _MATMUL_ROWS):
        logits = _raw_logits(rows[start : start + _MATMUL_ROWS], head.weight, head.bias)
        for offset in range(0, logits.size(0), _SCRATCH_ROWS):
            z = _shape_logits(logits[offset : offset + _SCRATCH_ROWS].to(wide), head.multiplier, head.softcap)
            first = start + offset
            losses[first : first + z.size(0)] = _cross_entropy(z, flat[first : first + z.size(0)])
    return losses


def _raw_logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(rows, weight, bias)


def _shape_logits(z: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """In place on a scratch: multiplier, then soft-cap."""
    if multiplier != 1.0:
        z.mul_(multiplier)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    counted = targets != IGNORE
    chosen = z.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(counted, z.logsumexp(1) - chosen, 0.0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass, so that R x V logits never exist: not in float32, and not all rows at once.

    The logits of a chunk are turned into their own gradient in place, through a float32 scratch of a few rows. The
    gradient of the head is added up in float32 over the chunks and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        scale: float,
        penalty: Penalty,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows)
        need_weight, need_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=rows.device) if need_weight else None
        grad_bias = torch.zeros(weight.size(0), dtype=wide, device=rows.device) if need_bias else None
        for start in range(0, rows.size(0), _MATMUL_ROWS):
            piece = rows[start : start + _MATMUL_ROWS]
            logits = _raw_logits(piece, weight, bias)
            for offset in range(0, logits.size(0), _SCRATCH_ROWS):
                part = logits[offset : offset + _SCRATCH_ROWS]
                first = start + offset
                total += _loss_and_gradient(part, targets[first : first + part.size(0)], head, penalty)
            torch.mm(logits, weight, out=grad_rows[start : start + _MATMUL_ROWS])
            if grad_weight is not None and piece.dtype == wide:
                grad_weight.addmm_(logits.mT, piece)
            elif grad_weight is not None:
                grad_weight += logits.mT @ piece
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
        factor = scale * head.multiplier
        ctx.gradients = (
            grad_rows.mul_(factor),
            grad_weight.mul_(factor).to(weight.dtype) if grad_weight is not None else None,
            grad_bias.mul_(factor).to(bias.dtype) if grad_bias is not None and bias is not None else None,
        )
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        gradients: tuple[Tensor | None, ...] = ctx.gradients
        ctx.gradients = None
        if grad_output.device.type != "cpu" or grad_output.item() != 1.0:
            gradients = tuple(g * grad_output.to(g.dtype) if g is not None else None for g in gradients)
        return (*gradients, None, None, None, None)


def _loss_and_gradient(part: Tensor, targets: Tensor, head: Head, penalty: Penalty) -> Tensor:
    """Summed loss of a few rows whose `targets` (R,) are all counted.

    `part`, their logits before multiplier and soft-cap, becomes the gradient but for a factor that the caller applies to
    what it multiplies with it, which is smaller.
    """
    wide = torch.promote_types(part.dtype, torch.float32)
    in_place = part.dtype == wide  # the logits are their own scratch
    z = _shape_logits(part if in_place else part.to(wide), head.multiplier, head.softcap)
    smoothing, column = penalty.label_smoothing, targets.unsqueeze(1)
    slope = 1.0 - (z / head.softcap).square_() if head.softcap is not None else None
    pull = z.gather(1, column).squeeze(1)  # what the targets pull on
    if smoothing:
        pull = pull.mul_(1.0 - smoothing).add_(z.mean(1), alpha=smoothing)
    peak = z.amax(1, keepdim=True)
    z.sub_(peak).exp_()
    norm = z.sum(1, keepdim=True)
    log_norm = norm.log().add_(peak)  # (R, 1)
    losses = log_norm.squeeze(1) - pull
    push = norm.reciprocal_()
    if penalty.z_loss:
        losses.add_(log_norm.squeeze(1).square(), alpha=penalty.z_loss)
        push.mul_(log_norm.mul_(2.0 * penalty.z_loss).add_(1.0))
    z.mul_(push)
    if smoothing:
        z.sub_(smoothing / z.size(1))
    z.scatter_add_(1, column, torch.full_like(push, smoothing - 1.0))
    if slope is not None:
        z.mul_(slope)
    if not in_place:
        part.copy_(z)
    return losses.sum()


def head_of(model: Decoder) -> Head:
    """The head of a decoder."""
    config = model.config
    return Head(model.head_weight, model.head.bias, config.logit_multiplier, config.logit_softcap)
