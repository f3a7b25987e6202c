"""A model of transformers' own behind the decoder's interface, for architectures that the decoder does not express.

It knows nothing of the architecture inside: any causal language model of transformers runs, at whatever state it keeps
between tokens. So a `KVCache` that belongs to it holds token ids instead of keys and values (four digits each, which
every number format holds exactly), and the state that transformers made of them is only remembered beside: where it does
not fit the ids, because a slot was copied or cut back, it is computed again. Rows of a cached call run one by one.

Legend: B rows, T tokens a row, C hidden size (or V, vocabulary size, see `hidden`).
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmctl.core.config.model import ModelConfig
from llmctl.core.model.cache import KVCache
from llmctl.core.model.decoder import Decoder
from llmctl.core.model.dropout import Dropout

_DIGITS, _BASE = 4, 256
"""bf16 and float16 hold every whole number up to 256."""
_STATE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls the state between tokens, newest name first."""


def adapted_config(*, vocab_size: int, hidden_size: int, max_positions: int) -> ModelConfig:
    """Facts for an `AdaptedModel`: true in these sizes; the rest is the shape of a cache that holds token ids."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_positions=max_positions,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=_DIGITS,
        mlp_size=1,
        positions="none",
        tie_embeddings=True,
    )


class AdaptedModel(Decoder):
    """Stands in for a Decoder in inference: `hidden`, `logits`, `forward`, `config`, `device`, `dtype`. It is not trained.

    `inner` is a causal language model of transformers in eval mode. What can be relied on is found out with a few tokens:
    whether its head may be applied apart from its trunk, and whether going on from its state gives what the whole text gives.
    """

    def __init__(self, inner: nn.Module, config: ModelConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.inner: Any = inner
        parameter = next(inner.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._states: WeakKeyDictionary[KVCache, dict[int, tuple[list[int], Any]]] = WeakKeyDictionary()
        with torch.no_grad():
            probe = torch.arange(1, 8, device=self._device)[None] % config.vocab_size  # (1, 7)
            self._head = self._head_apart(probe)
            self._state_name = self._usable_state(probe)

    @property
    def head_weight(self) -> Tensor:
        """Not to be had: transformers' heads are of many kinds. Raises TypeError."""
        raise TypeError("a model that runs through transformers is not trained or taken apart here")

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        return self._dtype

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Not to be had. Raises TypeError."""
        raise TypeError("a model that runs through transformers is not trained here")

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        document_lengths: Sequence[Sequence[int]] | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """What `logits` makes logits of, (B, T, C): hidden states, or the logits themselves where the two cannot be told apart.

        As `Decoder.hidden`, but without a cache positions are counted from 0, and there are no documents within a row.
        """
        if document_lengths is not None or dropout is not None:
            raise ValueError("a model that runs through transformers takes no documents within a row, and no dropout")
        if cache is None:
            if positions is not None and not torch.equal(positions.cpu(), torch.arange(tokens.shape[1]).expand_as(positions)):
                raise ValueError("without a cache, a model that runs through transformers takes positions from 0 on")
            return self._run(tokens, None)[0]
        batch, num_tokens = tokens.shape
        slots = torch.arange(batch) if slots is None else slots.cpu()
        if positions is None:
            positions = cache.lengths[slots][:, None] + torch.arange(num_tokens)
        positions = positions.cpu()
        if positions.numel() and int(positions.max()) >= cache.capacity:
            raise ValueError(f"position {int(positions.max())} does not fit a cache of {cache.capacity}")
        rows: list[Tensor | None] = []
        for row, slot in enumerate(slots.tolist()):
            places = (positions[row] >= 0).nonzero().flatten()
            if not len(places):
                rows.append(None)
                continue
            start = int(positions[row, places[0]])
            if not torch.equal(positions[row, places], torch.arange(start, start + len(places))):
                raise ValueError("the positions of a row must follow each other")
            new = self._go_on(cache, slot, start, tokens[row, places.to(tokens.device)].tolist())  # (t, C)
            padded = new.new_zeros(num_tokens, new.shape[-1])
            padded[places.to(new.device)] = new
            rows.append(padded)
            cache.lengths[slot] = start + len(places)
        width = next((row.shape[-1] for row in rows if row is not None), self.config.hidden_size)
        empty = torch.zeros(num_tokens, width, dtype=self._dtype, device=self._device)
        return torch.stack([empty if row is None else row for row in rows])

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., V), of what `hidden` gave."""
        if self._head is None:
            return hidden
        result: Tensor = self._head(hidden)
        return result

    def _go_on(self, cache: KVCache, slot: int, start: int, new: list[int]) -> Tensor:
        """Hidden states (t, C) of the tokens `new`, which come after the first `start` tokens of the slot."""
        before = _read_ids(cache, slot, start)
        _write_ids(cache, slot, start, new)
        states = self._states.setdefault(cache, {})
        held, state = states.pop(slot, ([], None))  # popped: it changes in place, and is lost if this call fails
        if state is None or held != before:
            feed, state = before + new, None
        else:
            feed = new
        hidden, state = self._run(torch.tensor([feed], device=self._device), state, keep=True)
        if state is not None:
            states[slot] = (before + new, state)
        return hidden[0, len(feed) - len(new) :]

    def _run(self, tokens: Tensor, state: Any, *, keep: bool = False) -> tuple[Tensor, Any]:
        """One call of the model inside: (B, T, C), and its state after it when `keep` and the model has a usable one."""
        name = self._state_name if keep else None
        options: dict[str, Any] = {"use_cache": name is not None}
        if name is not None and state is not None:
            options[name] = state
        with warnings.catch_warnings():  # the state's older names are announced to go, once a process
            warnings.simplefilter("ignore", FutureWarning)
            output = (self.inner if self._head is None else self.inner.base_model)(input_ids=tokens, **options)
        return output.logits if self._head is None else output[0], getattr(output, name, None) if name else None

    def _head_apart(self, probe: Tensor) -> nn.Module | None:
        """The head, if applying it to the trunk's output gives the model's logits to the bit; None if something comes between."""
        head, trunk = self.inner.get_output_embeddings(), self.inner.base_model
        if not isinstance(head, nn.Module) or trunk is self.inner:
            return None
        logits = self.inner(input_ids=probe, use_cache=False).logits
        try:
            again = head(trunk(input_ids=probe, use_cache=False)[0])
        except (TypeError, ValueError, RuntimeError, IndexError):  # a trunk that wants more than token ids
            return None
        return head if again.shape == logits.shape and torch.equal(again, logits) else None

    def _usable_state(self, probe: Tensor) -> str | None:
        """The name of the state, if going on from it by one and by two tokens gives what the whole text gives; else None."""
        self._state_name = None
        whole = self._run(probe, None)[0]
        callee = self.inner if self._head is None else self.inner.base_model
        known = inspect.signature(callee.forward).parameters
        for name in _STATE_NAMES:
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                continue
            self._state_name, state, parts = name, None, []
            try:
                for start, end in ((0, 4), (4, 5), (5, 7)):
                    part, state = self._run(probe[:, start:end], state, keep=True)
                    parts.append(part)
                    if state is None:
                        break
            except Exception:  # whatever an architecture raises on a state of another's kind: then there is none
                continue
            found = torch.cat(parts, dim=1)
            if state is not None and torch.allclose(found.float(), whole.float(), rtol=0.02, atol=1e-3 * float(whole.float().std() + 1)):
                return name
        return None


def _read_ids(cache: KVCache, slot: int, length: int) -> list[int]:
    digits = cache.keys[0][slot, 0, :length].float().round().long().cpu()  # (length, 4)
    weights = torch.tensor([_BASE**place for place in range(_DIGITS)])
    ids: list[int] = (digits * weights).sum(-1).tolist()
    return ids


def _write_ids(cache: KVCache, slot: int, start: int, ids: list[int]) -> None:
    values = torch.tensor(ids)[:, None] // torch.tensor([_BASE**place for place in range(_DIGITS)]) % _BASE  # (t, 4)
    store = cache.keys[0]
    store[slot, 0, start : start + len(ids)] = values.to(store.device, store.dtype)
