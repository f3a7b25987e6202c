"""A decoder as an ONNX graph, node by node from its facts. Knows ModelConfig and numpy; knows no torch and no file.

The graph is written here rather than traced from torch: a traced one fixes what an example happened to be (a batch of one, a
past that is not empty), changes with the exporter's version, and this decoder steers its caches by numbers on the CPU, which no
tracer follows. Standard operators of opset 17 only, so any runtime takes it.

Inputs and outputs have the names and shapes that Hugging Face's Optimum uses, one graph for prefill and decode:

    input_ids (B, T), attention_mask (B, P + T), position_ids (B, T)     int64
    past_key_values.<layer>.key and .value (B, Hkv, P, D)                float32; P is 0 for a new text
    logits (B, T, V), present.<layer>.key and .value (B, Hkv, P + T, D)

Legend: B rows, P tokens in the cache, T new tokens, K = P + T keys, C hidden size, H heads, Hkv key-value heads, G = H / Hkv,
D head size, R rotated size, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from llmctl.core.config.model import ModelConfig

OPSET = 17
IR_VERSION = 8
_MASKED = float(np.finfo(np.float32).min)
"""Not minus infinity: a row of padding, all of whose keys are masked, would become NaN."""


def why_not(config: ModelConfig) -> str | None:
    """What keeps a model from being written as a graph, or None."""
    if config.experts is not None:
        return "a mixture of experts, whose tokens go to matrices that standard ONNX operators cannot choose"
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        return "rotation by longrope, which changes with the length of the text"
    return None


def input_names(config: ModelConfig) -> list[str]:
    """Of the graph, in order."""
    return ["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", config)]


def output_names(config: ModelConfig) -> list[str]:
    """Of the graph, in order."""
    return ["logits", *_cache_names("present", config)]


def _cache_names(prefix: str, config: ModelConfig) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(config.num_layers) for part in ("key", "value")]


def build(config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]], rotations: "list[tuple[NDArray[np.float32], float]]") -> Any:
    """The model as an `onnx.ModelProto`. `tensors` are the decoder's; `rotations` are the angle per position of each of the
    R/2 pairs and the factor on sine and cosine: those of the usual layers, then those of layers with a window if they differ.
    """
    return _Graph(config, tensors, rotations).model()


def _declared(name: str, shape: list[int | str], *, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


class _Graph:
    """Nodes and initializers under way. A method that returns text returns the name of a value in the graph."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]], rotations: "list[tuple[NDArray[np.float32], float]]"
    ) -> None:
        self._config, self._tensors, self._rotations = config, tensors, rotations
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._biases: dict[int | None, str] = {}

    def model(self) -> Any:
        """All of it."""
        config = self._config
        logits = self._logits(self._hidden())
        self._op("Identity", logits, output="logits")
        past, present = (
            [_declared(name, ["batch_size", config.num_kv_heads, length, config.head_dim]) for name in _cache_names(prefix, config)]
            for prefix, length in (("past_key_values", "past_sequence_length"), ("present", "total_sequence_length"))
        )
        lengths = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length", "position_ids": "sequence_length"}
        ids = [_declared(name, ["batch_size", length], kind=TensorProto.INT64) for name, length in lengths.items()]
        scores = _declared("logits", ["batch_size", "sequence_length", config.vocab_size])
        graph = helper.make_graph(self._nodes, "decoder", [*ids, *past], [scores, *present], initializer=list(self._initializers.values()))
        return helper.make_model(graph, producer_name="llmctl", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    # --- pieces

    def _op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{len(self._nodes)}", **attributes))
        return name

    def _held(self, name: str, array: NDArray[Any]) -> str:
        """An initializer, once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _number(self, value: float) -> str:
        return self._held(f"number_{value!r}", np.array(value, dtype=np.float32))

    def _shape(self, *sizes: int) -> str:
        """Whole numbers in a row; for Reshape, 0 keeps a size and -1 takes the rest."""
        return self._held("sizes_" + "_".join(map(str, sizes)), np.array(sizes, dtype=np.int64))

    def _scaled(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else self._op("Mul", x, self._number(factor))

    def _linear(self, x: str, name: str) -> str:
        """x W^T + b of the decoder's module `name`."""
        result = self._op("MatMul", x, self._held(f"{name}.weight", self._tensors[f"{name}.weight"].T))
        bias = self._tensors.get(f"{name}.bias")
        return result if bias is None else self._op("Add", result, self._held(f"{name}.bias", bias))

    def _norm(self, x: str, name: str, *, rms: bool | None = None) -> str:
        """Over the last dimension; x itself where the model has no such norm."""
        config, weight = self._config, self._tensors.get(f"{name}.weight")
        if weight is None:
            return x
        rms = config.norm == "rms" if rms is None else rms
        if not rms:
            bias = self._tensors.get(f"{name}.bias", np.zeros_like(weight))
            held = self._held(f"{name}.weight", weight), self._held(f"{name}.bias", bias)
            return self._op("LayerNormalization", x, *held, axis=-1, epsilon=config.norm_eps)
        mean = self._op("ReduceMean", self._op("Mul", x, x), axes=[-1], keepdims=1)
        root = self._op("Sqrt", self._op("Add", mean, self._number(config.norm_eps)))
        return self._op("Mul", self._op("Div", x, root), self._held(f"{name}.weight", weight + 1.0 if config.norm_plus_one else weight))

    def _activated(self, x: str) -> str:
        kind = self._config.activation
        if kind == "relu":
            return self._op("Relu", x)
        if kind == "silu":
            return self._op("Mul", x, self._op("Sigmoid", x))
        if kind == "gelu":
            inner = self._op("Erf", self._scaled(x, 1 / math.sqrt(2)))
        else:
            cube = self._op("Mul", self._op("Mul", x, x), x)
            inner = self._op("Tanh", self._scaled(self._op("Add", x, self._scaled(cube, 0.044715)), math.sqrt(2 / math.pi)))
        return self._op("Mul", self._scaled(x, 0.5), self._op("Add", inner, self._number(1.0)))

    def _capped(self, x: str, cap: float | None) -> str:
        return x if cap is None else self._scaled(self._op("Tanh", self._scaled(x, 1 / cap)), cap)

    # --- the decoder

    def _hidden(self) -> str:
        config = self._config
        x = self._op("Gather", self._held("embed.weight", self._tensors["embed.weight"]), "input_ids")  # (B, T, C)
        x = self._scaled(x, config.embedding_multiplier)
        if config.positions in ("learned", "sinusoidal"):
            table = self._held("positions.weight", self._tensors["positions.weight"])
            x = self._op("Add", x, self._op("Gather", table, "position_ids"))
        angles = [self._angles(number) for number in range(len(self._rotations))]
        for layer in range(config.num_layers):
            x = self._layer(x, layer, angles)
        return self._norm(x, "final_norm")

    def _logits(self, x: str) -> str:
        config = self._config
        if config.tie_embeddings:
            weight = self._op("Transpose", "embed.weight", perm=[1, 0])  # held once; runtimes fold or fuse it
        else:
            weight = self._held("head.weight", self._tensors["head.weight"].T)
        logits = self._op("MatMul", x, weight)
        if config.head_bias:
            logits = self._op("Add", logits, self._held("head.bias", self._tensors["head.bias"]))
        return self._capped(self._scaled(logits, config.logit_multiplier), config.logit_softcap)

    def _layer(self, x: str, layer: int, angles: list[tuple[str, str]]) -> str:
        """The four arrangements of model/layers.py."""
        config, name = self._config, f"layers.{layer}"
        attended = self._attention(self._norm(x, f"{name}.attn_norm"), layer, angles)
        attended = self._scaled(self._norm(attended, f"{name}.attn_post_norm"), config.residual_multiplier)
        between = self._op("Add", x, attended)
        inner = self._mlp(self._norm(x if config.parallel_residual else between, f"{name}.mlp_norm"), f"{name}.mlp")
        return self._op("Add", between, self._scaled(self._norm(inner, f"{name}.mlp_post_norm"), config.residual_multiplier))

    def _mlp(self, x: str, name: str) -> str:
        up = self._linear(x, f"{name}.up")
        if self._config.gated_mlp:
            return self._linear(self._op("Mul", self._activated(self._linear(x, f"{name}.gate")), up), f"{name}.down")
        return self._linear(self._activated(up), f"{name}.down")

    def _angles(self, number: int) -> tuple[str, str]:
        """Cosine and sine of the new tokens' positions, (B, 1, T, R/2) each."""
        frequencies, factor = self._rotations[number]
        positions = self._op("Cast", self._op("Unsqueeze", "position_ids", self._shape(1, 3)), to=TensorProto.FLOAT)  # (B, 1, T, 1)
        angle = self._op("Mul", positions, self._held(f"rotation.{number}", frequencies))
        return self._scaled(self._op("Cos", angle), factor), self._scaled(self._op("Sin", angle), factor)

    def _rotated(self, x: str, angles: tuple[str, str]) -> str:
        """(B, H, T, D): dimension i turns with i + R/2, and what lies behind R stays."""
        cos, sin = angles
        size, half = self._config.head_dim, self._config.rotary_size // 2
        sizes = [half, half, *([size - 2 * half] if size > 2 * half else [])]
        parts = [f"split_{len(self._nodes)}_{number}" for number in range(len(sizes))]
        self._nodes.append(helper.make_node("Split", [x, self._shape(*sizes)], parts, name=f"node_{len(self._nodes)}", axis=-1))
        first, second = parts[:2]
        turned = [
            self._op("Sub", self._op("Mul", first, cos), self._op("Mul", second, sin)),
            self._op("Add", self._op("Mul", second, cos), self._op("Mul", first, sin)),
        ]
        return self._op("Concat", *turned, *parts[2:], axis=-1)

    def _attention(self, x: str, layer: int, angles: list[tuple[str, str]]) -> str:
        config, name = self._config, f"layers.{layer}.attn"
        heads, shared, size = config.num_heads, config.num_kv_heads, config.head_dim
        q, k, v = (self._linear(x, f"{name}.{part}") for part in ("q", "k", "v"))
        if config.qk_norm_whole:
            q, k = self._norm(q, f"{name}.q_norm", rms=True), self._norm(k, f"{name}.k_norm", rms=True)
        q, k, v = (self._op("Reshape", part, self._shape(0, 0, count, size)) for part, count in ((q, heads), (k, shared), (v, shared)))
        if config.qk_norm:
            q, k = self._norm(q, f"{name}.q_norm", rms=True), self._norm(k, f"{name}.k_norm", rms=True)
        q, k, v = (self._op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, k, v))  # (B, H or Hkv, T, D)
        if config.positions == "rope" and (config.rope_layers is None or config.rope_layers[layer]):
            turn = angles[-1 if config.window(layer) is not None else 0]
            q, k = self._rotated(q, turn), self._rotated(k, turn)
        k = self._op("Concat", f"past_key_values.{layer}.key", k, axis=2, output=f"present.{layer}.key")  # (B, Hkv, K, D)
        v = self._op("Concat", f"past_key_values.{layer}.value", v, axis=2, output=f"present.{layer}.value")
        # heads that share a key stand side by side, so that keys are not repeated in memory
        q = self._op("Reshape", q, self._shape(0, shared, heads // shared, -1, size))  # (B, Hkv, G, T, D)
        k = self._op("Unsqueeze", self._op("Transpose", k, perm=[0, 1, 3, 2]), self._shape(2))  # (B, Hkv, 1, D, K)
        v = self._op("Unsqueeze", v, self._shape(2))  # (B, Hkv, 1, K, D)
        scale = size**-0.5 if config.attention_scale is None else config.attention_scale
        scores = self._capped(self._op("MatMul", self._scaled(q, scale), k), config.attention_softcap)
        weights = self._op("Softmax", self._op("Add", scores, self._bias(config.window(layer))), axis=-1)
        mixed = self._op("Reshape", self._op("MatMul", weights, v), self._shape(0, heads, -1, size))  # (B, H, T, D)
        joined = self._op("Reshape", self._op("Transpose", mixed, perm=[0, 2, 1, 3]), self._shape(0, 0, heads * size))
        return self._linear(joined, f"{name}.o")

    def _bias(self, window: int | None) -> str:
        """0 where a query sees a key and the least number elsewhere, (B, 1, 1, T, K); made once for each window."""
        if window not in self._biases:
            self._biases[window] = self._new_bias(window)
        return self._biases[window]

    def _new_bias(self, window: int | None) -> str:
        keys, queries = self._numbered()  # (K,), (T, 1): places in the cache, which padding on the left shifts alike
        seen = self._op("LessOrEqual", keys, queries)
        if window is not None:
            past_window = self._op("Sub", queries, self._held(f"window_{window}", np.array(window, dtype=np.int64)))
            seen = self._op("And", seen, self._op("Greater", keys, past_window))
        real = self._op("Cast", self._op("Unsqueeze", "attention_mask", self._shape(1)), to=TensorProto.BOOL)  # (B, 1, K)
        allowed = self._op("Unsqueeze", self._op("And", seen, real), self._shape(1, 2))  # (B, 1, 1, T, K)
        return self._op("Where", allowed, self._number(0.0), self._number(_MASKED))

    def _numbered(self) -> tuple[str, str]:
        zero, one = self._held("zero", np.array(0, dtype=np.int64)), self._held("one", np.array(1, dtype=np.int64))
        num_keys = self._op("Squeeze", self._op("Shape", "attention_mask", start=1, end=2), self._shape(0))
        num_queries = self._op("Squeeze", self._op("Shape", "input_ids", start=1, end=2), self._shape(0))
        keys = self._op("Range", zero, num_keys, one)
        queries = self._op("Range", self._op("Sub", num_keys, num_queries), num_keys, one)
        return keys, self._op("Unsqueeze", queries, self._shape(1))
