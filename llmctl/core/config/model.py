"""The facts of an architecture that the decoder reads. Knows no family, no tensor and no file."""

from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.core.errors import InputError

MAX_LAYERS = 4096
"""Far beyond any model: a config.json that asks for a billion layers must not be tried."""
MAX_EXPERTS = 1 << 16
"""In all layers together."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts beyond the trained one.

    `kind` is "linear", "dynamic", "llama3", "yarn" or "longrope"; `parameters` are that kind's numbers under the names
    that Hugging Face configs use (factor, original_max_position_embeddings, low_freq_factor, ...).
    """

    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A routed feed-forward: each token passes through `num_active` of `num_experts` mlps of `mlp_size` (Shazeer et al. 2017)."""

    num_experts: int
    num_active: int
    mlp_size: int
    normalised: bool
    """Whether the weights of a token's chosen experts are divided by their sum."""
    layers: tuple[bool, ...]
    """For each layer, whether its feed-forward is routed; the others have the ordinary one of `ModelConfig.mlp_size`."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "mlp_size"):
            if not 1 <= getattr(self, name) <= 1 << 31:
                raise InputError(f"model config: {name} of the experts is {getattr(self, name)}; a whole number from 1 on is wanted")
        if self.num_experts * sum(self.layers) > MAX_EXPERTS:
            raise InputError(f"model config: {self.num_experts} experts in {sum(self.layers)} layers; at most {MAX_EXPERTS} are built")
        if not 1 <= self.num_active <= self.num_experts:
            raise InputError(f"model config: {self.num_active} experts a token are wanted, there are {self.num_experts}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Facts of one decoder-only transformer, validated once, here. Sizes are counts of elements.

    Raises InputError for facts that contradict each other, since they come from somebody's config.json.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_plus_one: bool = False
    """RMS norms multiply by 1 + weight (Gemma), which the checkpoint stores less its one."""
    pre_norms: bool = True
    """Norms of what attention and mlp read."""
    post_norms: bool = False
    """Norms of what attention and mlp add to the residual stream (Gemma 2 has both, OLMo 2 only these)."""
    parallel_residual: bool = False
    """Attention and mlp read the same hidden states, each through its norm, and are added together (GPT-NeoX)."""
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Rotated dimensions of each head; None means all of `head_dim`."""
    local_rope_theta: float | None = None
    """Rope theta of the layers with a window, which have no scaling then; None means that they are as the others (Gemma 3)."""
    rope_layers: tuple[bool, ...] | None = None
    """For each layer, whether it rotates at all; None means all do (SmolLM3 leaves out every fourth)."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    """RMS norm over `head_dim` of each query and key head, before the rotation (Qwen3)."""
    qk_norm_whole: bool = False
    """RMS norm over all query heads together, and over all key heads, before the rotation (OLMo 2)."""
    windows: tuple[int | None, ...] | None = None
    """Sliding-window length of each layer, in tokens; None means full attention."""
    attention_scale: float | None = None
    """Multiplies the attention scores; None means head_dim ** -0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    experts: Experts | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    scale_residual_init: bool = False
    """Divide the initial std of the two residual output projections by sqrt(2 * num_layers) (GPT-2)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 31:
                raise InputError(f"model config: {name} is {value!r}; a whole number from 1 on is wanted")
        if self.num_layers > MAX_LAYERS:
            raise InputError(f"model config: {self.num_layers} layers; at most {MAX_LAYERS} are built")
        if not self.norm_eps > 0 or not self.initializer_range >= 0:
            raise InputError(f"model config: norm_eps {self.norm_eps} or initializer_range {self.initializer_range} is out of range")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"model config: {self.num_heads} heads cannot share {self.num_kv_heads} key-value heads evenly")
        if self.positions == "rope" and self.rotary_size % 2:
            raise InputError(f"model config: rotary positions need an even size, {self.rotary_size} was found")
        if not 0 <= self.rotary_size <= self.head_dim:
            raise InputError(f"model config: {self.rotary_size} dimensions cannot be rotated in heads of {self.head_dim}")
        if self.rope_scaling is not None:
            self._check_scaling(self.rope_scaling)
        if self.windows is not None and len(self.windows) != self.num_layers:
            raise InputError(f"model config: {len(self.windows)} windows for {self.num_layers} layers")
        if self.windows is not None and any(window is not None and not 1 <= window <= 1 << 31 for window in self.windows):
            raise InputError("model config: a window must hold at least 1 token, and not more than 2^31")
        if self.qk_norm and self.qk_norm_whole:
            raise InputError("model config: queries and keys are normed by head or as a whole, not both")
        for what, flags in (("rope_layers", self.rope_layers), ("layers of experts", self.experts.layers if self.experts else None)):
            if flags is not None and len(flags) != self.num_layers:
                raise InputError(f"model config: {what} names {len(flags)} layers, there are {self.num_layers}")

    def _check_scaling(self, scaling: RopeScaling) -> None:
        """Refuse numbers that the formulas of core/model/rope.py would divide by zero with."""
        low, high = scaling.parameters.get("low_freq_factor"), scaling.parameters.get("high_freq_factor")
        if low is not None and high is not None and not low < high:
            raise InputError(f"model config: the rope's low_freq_factor {low} must be below its high_freq_factor {high}")
        if scaling.kind == "dynamic" and self.rotary_size < 4:
            raise InputError(f"model config: dynamic rope scaling needs 4 rotated dimensions, {self.rotary_size} were found")
        if scaling.kind == "yarn" and not self.rope_theta > 1:
            raise InputError(f"model config: yarn needs a rope_theta above 1, {self.rope_theta} was found")
        for name in ("short_factor", "long_factor") if scaling.kind == "longrope" else ():
            factors = scaling.parameters.get(name, ())
            if len(factors) != self.rotary_size // 2:
                raise InputError(f"model config: the rope's {name} has {len(factors)} numbers, {self.rotary_size // 2} are wanted")

    @property
    def rotary_size(self) -> int:
        """Rotated dimensions of each head."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def longest_short_text(self) -> int | None:
        """The longest text that "longrope" turns by its short factors, in tokens; None where all texts are turned alike."""
        if self.positions != "rope" or self.rope_scaling is None or self.rope_scaling.kind != "longrope":
            return None
        return int(self.rope_scaling.parameters["original_max_position_embeddings"])

    def window(self, layer: int) -> int | None:
        """Sliding-window length of a layer; None means full attention."""
        return None if self.windows is None else self.windows[layer]

    def routes(self, layer: int) -> bool:
        """Whether the layer's feed-forward is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def query_size(self) -> int:
        """num_heads * head_dim, which need not be hidden_size."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim
