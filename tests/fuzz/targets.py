"""Files of a model with one of them replaced: opening them gives a model, or an error of exit code 4, and nothing else.

Shared by the property tests (test_fuzz.py) and by the coverage-guided harness (guided.py).
"""

import json
import shutil
import signal
import tempfile
from functools import cache
from pathlib import Path
from types import FrameType

import torch

from llmctl.core.checkpoint import load_model, load_model_and_tokenizer
from llmctl.core.config.export import ExportConfig
from llmctl.core.errors import InputError, LlmctlError
from llmctl.core.export.export import export
from tests.core.export.tiny import make_model
from tests.core.test_gguf_tokenizer import sentencepiece_file

HANG_S = 60
"""No file here takes a tenth of a second; a machine may stall."""
FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
GGUFS = ("byte-level.gguf", "sentencepiece.gguf")


@cache
def sound() -> Path:
    """A folder with a sharded model of tiny sizes, and two GGUF files beside, one for each kind of tokenizer."""
    import tokenizers

    from llmctl.core.checkpoint import load_tokenizer

    root = Path(tempfile.mkdtemp(prefix="llmctl-fuzz-"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    make_model(root / "source", **sizes)
    list(export(ExportConfig(model=str(root / "source"), output=root / "folder", max_shard_size="40KB", verify=False)))
    list(export(ExportConfig(model=str(root / "source"), output=root / GGUFS[0], format="gguf", dtype="q4_0", verify=False)))
    sentencepiece_file(root / "words.gguf", architecture="llama")
    backend = tokenizers.Tokenizer.from_str(load_tokenizer(root / "words.gguf").to_json())
    make_model(root / "other", backend=backend, vocab_size=500, **sizes)
    list(export(ExportConfig(model=str(root / "other"), output=root / GGUFS[1], format="gguf", verify=False)))
    assert (root / "folder" / FILES[2]).is_file()
    return root


def content(name: str) -> bytes:
    """The sound content of one of FILES or GGUFS."""
    return (sound() / name if name in GGUFS else sound() / "folder" / name).read_bytes()


@cache
def _place(name: str) -> Path:
    """Where the replaced file goes: into a copy of the folder, or by itself."""
    if name in GGUFS:
        return sound() / "damaged.gguf"
    folder = sound() / f"with another {name}"
    shutil.copytree(sound() / "folder", folder)
    return folder / name


def open_with(name: str, replaced: bytes) -> bool:
    """Open the model whose file `name` has another content: whether it was taken. Any other end than an exit code 4 is raised.

    A model that was taken must also give logits: shapes that do not fit show then.
    """
    place = _place(name)
    place.unlink(missing_ok=True)  # not written over: an earlier model may have it mapped
    place.write_bytes(replaced)
    path = place if name in GGUFS else place.parent
    before = signal.signal(signal.SIGALRM, _hung)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        loaded, tokenizer = load_model_and_tokenizer(path)
        ids = tokenizer.encode("the cat sat", add_bos=False)[: loaded.config.max_positions] or [0]
        tokenizer.decode(ids)
        with torch.inference_mode():
            loaded.model(torch.tensor([ids]))
        if name in GGUFS:
            load_model(path, quant="int8")
    except LlmctlError as error:
        if error.exit_code != InputError.exit_code or "\n" in str(error):
            raise AssertionError(f"exit code {error.exit_code}: {error}") from error
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return True


def _hung(_: int, __: FrameType | None) -> None:
    raise AssertionError(f"no end within {HANG_S} s")


def parsed(name: str) -> object:
    """The sound JSON of one of FILES."""
    return json.loads(content(name))
