"""The settings of `llmctl export`. Stdlib only; knows no tensor."""

import re
from dataclasses import dataclass
from pathlib import Path

from llmctl.core.config.fields import check_fields, option, option_like
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.errors import UsageError

_OUT, _NUMBERS = "Result", "Numbers"

FLOATS = {"float32": "float32", "f32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "f16": "float16"}
GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `llmctl export` does. `None` means "not given"."""

    model: str | None = option(
        None, "Model to export: folder, .gguf file, hub id or built-in name. [default: $LLMCTL_MODEL]", metavar="MODEL", positional=True
    )
    adapter: str | None = option_like(GenerateConfig, "adapter")
    output: Path | None = option(
        None, "Folder (hf, quant, onnx) or file (gguf, word2vec) to make.", "-o", "--out-dir", "--output-dir", metavar="PATH", panel=_OUT
    )
    format: str = option(
        "hf",
        "A Hugging Face directory, a GGUF file, a directory with quantised weights, the token embeddings in word2vec's format, "
        "or an ONNX graph with cache.",
        choices=("hf", "gguf", "quant", "word2vec", "onnx"),
        panel=_OUT,
    )
    overwrite: bool = option(False, "Replace the file if it exists; a folder that holds something is never replaced.", panel=_OUT)
    verify: bool = option(True, "Load the result back, compare its logits with the model's, and print the largest difference.", panel=_OUT)
    max_shard_size: str = option("5GB", "Largest weight file of a directory, as 500MB or 5GB.", metavar="SIZE", panel=_OUT)
    binary: bool = option(False, "word2vec: the binary form rather than text.", panel=_OUT)

    dtype: str | None = option(
        None,
        "Number format of the weights; q8_0 and q4_0 for GGUF only. [default: as stored]",
        "--precision",
        choices=(*FLOATS, "q8_0", "q4_0"),
        panel=_NUMBERS,
    )
    quant: str | None = option(
        None,
        "quant: layout of the matrices; embeddings and head take 8 bits in either. [default: int8]",
        choices=("int8", "int4"),
        panel=_NUMBERS,
    )
    threads: int | None = option_like(GenerateConfig, "threads")

    def __post_init__(self) -> None:
        check_fields(self)
        shard_bytes(self.max_shard_size)
        if self.dtype in ("q8_0", "q4_0") and self.format != "gguf":
            raise UsageError(f"--dtype {self.dtype}: is a type of GGUF; add --format gguf")
        if self.dtype is not None and self.format in ("quant", "word2vec"):
            raise UsageError(f"--dtype does not go with --format {self.format}, whose numbers have one form")
        if self.format == "onnx" and self.float_dtype not in (None, "float32"):
            raise UsageError(f"--dtype {self.dtype}: an ONNX graph is written in float32; leave --dtype out")
        if self.quant is not None and self.format != "quant":
            raise UsageError("--quant: needs --format quant (GGUF's own types are --dtype q8_0 and q4_0)")
        if self.binary and self.format != "word2vec":
            raise UsageError("--binary: needs --format word2vec")
        if self.output is not None and self.output.suffix == ".gguf" and self.format != "gguf":
            raise UsageError(f"--output {self.output}: ends with .gguf, but --format is {self.format}; add --format gguf")
        if self.output is not None and self.output.suffix != ".gguf" and self.format == "gguf":
            raise UsageError(f"--output {self.output}: a GGUF file's name ends with .gguf, or programs do not know it")

    @property
    def float_dtype(self) -> str | None:
        """The number format by its long name, where one of floats was given."""
        return FLOATS.get(self.dtype or "")

    @property
    def gguf_type(self) -> str | None:
        """--dtype as a type of GGUF."""
        return None if self.dtype is None else GGUF_TYPES[FLOATS.get(self.dtype, self.dtype)]


def shard_bytes(text: str) -> int:
    """ "5GB", "500MB", "64KiB" or "1000000" in bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d+)?)\s*([A-Za-z]{0,3})", text.strip())
    unit = _UNITS.get(found[2].upper()) if found is not None else None
    size = int(float(found[1]) * unit) if found is not None and unit is not None else 0
    if size < 1:
        raise UsageError(f"--max-shard-size: {text!r} is not a size; write it like 500MB or 5GB")
    return size
