"""ONNX files out, and back through onnxruntime. Knows the graph of onnx_graph.py and files; knows no command.

A folder as Hugging Face's Optimum writes it: model.onnx (its large tensors in model.onnx_data), config.json, tokenizer.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, MissingExtraError, write_error
from llmctl.core.model import Decoder
from llmctl.core.model.decoder import rotations

MODEL_NAME, DATA_NAME = "model.onnx", "model.onnx_data"
_LARGE_BYTES = 1 << 30
"""Above this the tensors go into a file of their own: a protobuf message cannot have 2 GB."""


def need_packages() -> None:
    """Raises MissingExtraError when onnx or onnxruntime is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--format onnx", extra="onnx") from error


def check_expressible(config: ModelConfig, *, family: str) -> None:
    """Raises InputError for a model that cannot be written so."""
    from llmctl.core.export.onnx_graph import why_not

    reason = why_not(config)
    if reason is not None:
        raise InputError(f"--format onnx: this {family} model has {reason}; choose --format hf or gguf")


def write(folder: Path, model: Decoder, *, large_bytes: int = _LARGE_BYTES) -> None:
    """Write `model`, float32, into `folder`, checked by ONNX's own checker. Raises WriteError."""
    import onnx

    from llmctl.core.export.onnx_graph import build

    tensors = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    graph = build(model.config, tensors, [(frequencies.numpy(), factor) for frequencies, factor in rotations(model.config)])
    is_large = sum(tensor.nbytes for tensor in tensors.values()) > large_bytes
    try:
        onnx.save_model(graph, str(folder / MODEL_NAME), save_as_external_data=is_large, all_tensors_to_one_file=True, location=DATA_NAME)
    except OSError as error:
        raise write_error(error, path=folder / MODEL_NAME) from error
    onnx.checker.check_model(str(folder / MODEL_NAME))


def logits_by_runtime(folder: Path, tokens: Tensor, config: ModelConfig) -> Tensor:
    """Logits (1, T, V) of `tokens` (1, T) by onnxruntime on the CPU: half of them at once, some more with a cache, the last alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / MODEL_NAME), options, providers=["CPUExecutionProvider"])
    ids = tokens.numpy()
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_dim), dtype=np.float32)
    names = [entry.name for entry in session.get_inputs()][3:]
    cache: list[Any] = [empty for _ in names]
    pieces = []
    bounds = sorted({0, ids.shape[1] // 2, max(0, ids.shape[1] - 1), ids.shape[1]})
    for start, end in pairwise(bounds):
        feed = {
            "input_ids": ids[:, start:end],
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
            **dict(zip(names, cache, strict=True)),
        }
        logits, *cache = session.run(None, feed)
        pieces.append(logits)
    return torch.from_numpy(np.concatenate(pieces, axis=1))
