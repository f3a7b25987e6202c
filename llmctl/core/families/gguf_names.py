"""What GGUF calls the tensors of each architecture, as rules that are used both ways. No torch, no file.

The names are those of llama.cpp's gguf-py/gguf/constants.py; which of them an architecture may have (biases, an own head)
is what its src/models/*.cpp asks for, since it refuses a file with a tensor more or less.
"""

from collections.abc import Sequence

from llmctl.core.families.base import Rule

_B, _L = "blk.{i}", "layers.{i}"
_EMBED, _HEAD, _FINAL = Rule("token_embd.weight", ("embed.weight",)), Rule("output.weight", ("head.weight",)), ("output_norm", "final_norm")
HEAD = _HEAD.theirs


def _linear(theirs: str, *ours: str, bias: bool) -> tuple[Rule, ...]:
    """A matrix, or several in one, with its bias where the architecture may have one."""
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(Rule(f"{theirs}.{part}", tuple(f"{name}.{part}" for name in ours)) for part in parts)


def _attention(*, qkv_bias: bool = True, out_bias: bool = False) -> tuple[Rule, ...]:
    return (
        *(rule for part in ("q", "k", "v") for rule in _linear(f"{_B}.attn_{part}", f"{_L}.attn.{part}", bias=qkv_bias)),
        *_linear(f"{_B}.attn_output", f"{_L}.attn.o", bias=out_bias),
    )


def _fused_attention(*, bias: bool) -> tuple[Rule, ...]:
    return (
        *_linear(f"{_B}.attn_qkv", *(f"{_L}.attn.{part}" for part in ("q", "k", "v")), bias=bias),
        *_linear(f"{_B}.attn_output", f"{_L}.attn.o", bias=bias),
    )


def _mlp(*parts: str, bias: bool = False) -> tuple[Rule, ...]:
    return tuple(rule for part in parts for rule in _linear(f"{_B}.ffn_{part}", f"{_L}.mlp.{part}", bias=bias))


def _norms(*pairs: tuple[str, str], bias: bool = False) -> tuple[Rule, ...]:
    return tuple(rule for theirs, ours in (*pairs, _FINAL) for rule in _linear(theirs, ours, bias=bias))


_BEFORE = ((f"{_B}.attn_norm", f"{_L}.attn_norm"), (f"{_B}.ffn_norm", f"{_L}.mlp_norm"))
_AFTER = ((f"{_B}.post_attention_norm", f"{_L}.attn_post_norm"), (f"{_B}.post_ffw_norm", f"{_L}.mlp_post_norm"))
_QK = tuple((f"{_B}.attn_{part}_norm", f"{_L}.attn.{part}_norm") for part in ("q", "k"))
_ROUTED = (
    Rule(f"{_B}.ffn_gate_inp.weight", (f"{_L}.mlp.router.weight",)),
    *(Rule(f"{_B}.ffn_{part}_exps.weight", (f"{_L}.mlp.experts.{{e}}.{part}.weight",)) for part in ("gate", "up", "down")),
)
_GATED, _PLAIN = ("gate", "up", "down"), ("up", "down")


def _rules(*groups: Sequence[Rule], head: bool = True) -> tuple[Rule, ...]:
    """All of them, embeddings first; `head` says whether the architecture may have a head of its own."""
    return (_EMBED, *(rule for group in groups for rule in group), *((_HEAD,) if head else ()))


LLAMA = _rules(_norms(*_BEFORE), _attention(out_bias=True), _mlp(*_GATED, bias=True))
"""Granite's too."""
LLAMA_EXPERTS = _rules(_norms(*_BEFORE), _attention(out_bias=True), _ROUTED)
QWEN2 = _rules(_norms(*_BEFORE), _attention(), _mlp(*_GATED))
"""SmolLM3's too."""
QWEN3 = _rules(_norms(*_BEFORE, *_QK), _attention(), _mlp(*_GATED))
QWEN3_MOE = _rules(_norms(*_BEFORE, *_QK), _attention(), _ROUTED)
GEMMA = _rules(_norms(*_BEFORE), _attention(), _mlp(*_GATED), head=False)
GEMMA2 = _rules(_norms(*_BEFORE, *_AFTER), _attention(), _mlp(*_GATED), head=False)
GEMMA3 = _rules(_norms(*_BEFORE, *_AFTER, *_QK), _attention(), _mlp(*_GATED))
OLMO2 = _rules(_norms(*_AFTER, *_QK), _attention(), _mlp(*_GATED))
PHI3 = _rules(
    _norms(*_BEFORE),
    _fused_attention(bias=False),
    _linear(f"{_B}.ffn_up", f"{_L}.mlp.gate", f"{_L}.mlp.up", bias=False),
    _mlp("down"),
)
GPT_NEOX = _rules(_norms(*_BEFORE, bias=True), _fused_attention(bias=True), _mlp(*_PLAIN, bias=True))
GPT2 = _rules((Rule("position_embd.weight", ("positions.weight",)),), GPT_NEOX[1:-1])
