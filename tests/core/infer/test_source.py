"""What the native executor reads from directories and GGUF files, against what the torch path makes of the same files, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmctl.core.checkpoint import load_model, save_quantised
from llmctl.core.checkpoint.quantweight import QuantWeight
from llmctl.core.errors import InputError
from llmctl.core.infer.opening import open_model
from llmctl.core.infer.source import open_source
from llmctl.core.native.library import Int4Matrix, Int8Matrix, from_bf16
from llmctl.core.quant import LAYOUTS, Layout
from tests.cli.tiny_model import make_model
from tests.core.gguf_writer import blocky_experts, blocky_model, write_model
from tests.core.native.models import library_is_built

pytestmark = pytest.mark.skipif(not library_is_built(), reason="the native library was not built")
pytest.importorskip("gguf")


def directory(folder: Path, model: Any = None) -> Path:
    (model or blocky_model()).save_pretrained(folder / "m")
    return folder / "m"


def bf16_directory(folder: Path) -> Path:
    blocky_model().to(torch.bfloat16).save_pretrained(folder / "m")
    return folder / "m"


def gguf_file(dtype: str, folder: Path, model: Any = None) -> Path:
    write_model(folder / "m.gguf", model or blocky_model(), dtype=dtype)
    return folder / "m.gguf"


def quantised_directory(layout: Layout, folder: Path, model: Any = None) -> Path:
    loaded = load_model(directory(folder, model), quant=layout)
    (folder / "q").mkdir()
    save_quantised(folder / "q", config=loaded.config, family=loaded.family, tensors=loaded.model.state_dict(), layout=layout)
    return folder / "q"


KINDS: dict[str, Any] = {
    "directory": directory,
    "bf16 directory": bf16_directory,
    **{f"{dtype} GGUF": lambda folder, dtype=dtype: gguf_file(dtype, folder) for dtype in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")},
    **{f"{layout} directory": lambda folder, layout=layout: quantised_directory(layout, folder) for layout in LAYOUTS},
    "experts directory": lambda folder: directory(folder, blocky_experts()),
    "experts int8 directory": lambda folder: quantised_directory("int8", folder, blocky_experts()),
    **{
        f"experts {dtype} GGUF": lambda folder, dtype=dtype: gguf_file(dtype, folder, blocky_experts()) for dtype in ("F16", "Q8_0", "Q4_0")
    },
}


def numbers(tensor: Any) -> dict[str, np.ndarray]:
    """The arrays that stand for a tensor, from either path."""
    if isinstance(tensor, QuantWeight):
        tensor = tensor.matrix()
    if hasattr(tensor, "codes"):
        parts = {name: getattr(tensor, name, None) for name in ("codes", "scales", "minimums")}
        return {name: np.asarray(part) for name, part in parts.items() if part is not None}
    if isinstance(tensor, torch.Tensor):
        return {"numbers": tensor.float().numpy()}
    return {"numbers": from_bf16(tensor) if tensor.dtype == np.uint16 else np.asarray(tensor, np.float32)}


@pytest.mark.parametrize("quant", [None, *LAYOUTS])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_the_torch_path(kind: str, quant: Layout | None, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    source = open_source(path)
    if source.own is not None and quant not in (None, source.own):
        with pytest.raises(InputError, match="quantised already"):
            dict(source.tensors(quant))
        return
    wanted = load_model(path, dtype=torch.float32, quant=quant)
    assert source.config == wanted.config
    found = dict(source.tensors(quant))
    assert found.keys() == wanted.model.state_dict().keys()
    for name, tensor in wanted.model.state_dict().items():
        theirs, ours = numbers(tensor), numbers(found[name])
        assert theirs.keys() == ours.keys(), name
        for part, array in theirs.items():
            np.testing.assert_array_equal(ours[part], array, err_msg=f"{name} {part}")
    if quant is not None or source.own is not None:
        assert any(isinstance(tensor, Int8Matrix | Int4Matrix) for tensor in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_native_executor_opens_each_kind_and_gives_the_logits_of_torch(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tmp_path)
    ids = np.arange(1, 13, dtype=np.int64)[None]
    logits = {}
    for executor in ("native", "torch"):
        opened = open_model(path, device="cpu", dtype="float32", executor=executor, threads=1)
        assert opened.kind == executor
        opened.executor.reserve(num_slots=1, capacity=16)
        logits[executor] = opened.executor.step(ids, np.zeros(1, np.int64), np.zeros(1, np.int64), all_logits=True)
    # natively the inputs of quantised matrices are quantised too
    tolerance = 0.05 if kind.endswith(("int8 directory", "int4 directory")) else 1e-4
    np.testing.assert_allclose(logits["native"], logits["torch"], atol=tolerance * float(np.abs(logits["torch"]).max()))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_source(folder)
