"""LoRA adapters in PEFT's directory format, read and written; the fingerprint of the model that one belongs to. No torch.

    adapter_config.json          what PEFT's LoraConfig says: rank, alpha, target modules, the base model's name
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight (r, I) and .lora_B.weight (O, r) for each module

Modules have the names that transformers gives them, where several of the decoder's matrices may be one (GPT-2's c_attn).
The header of the weights holds the fingerprint of the base under FINGERPRINT_KEY, which PEFT does not look at. The format is
that of https://huggingface.co/docs/peft/developer_guides/checkpoint.

Legend: r rank, I inputs, O outputs.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.core.checkpoint.folder import ADAPTER_CONFIG, and_more, bindings_of, read_object
from llmctl.core.checkpoint.stored import WEIGHT_DTYPES, Stored
from llmctl.core.config.model import ModelConfig
from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.families import Family
from llmctl.core.families.base import Binding
from llmctl.core.native.library import from_bf16, to_bf16
from llmctl.core.tensorfile import PICKLES, TensorFile

WEIGHTS_NAME = "adapter_model.safetensors"
FINGERPRINT_KEY = "llmctl_base_fingerprint"
ALL_LINEAR = "all-linear"
NO_MERGING = "the weights are quantised, and no adapter can be merged into them; take the model they were made from"
_PREFIX = "base_model.model."
_PARTS = {".lora_A.weight": "a", ".lora_B.weight": "b"}

_UNREADABLE = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # the others change the base's weights
}
"""Keys of adapter_config.json that ask for more than two matrices beside a third -> the values that do not."""

_SAMPLED = 256
"""Numbers of a row that the fingerprint looks at."""


def adaptable_modules(config: ModelConfig, family: Family) -> dict[str, Binding]:
    """Module name of transformers -> the decoder's matrices in it, of all that can be adapted: those of the layers.

    Experts and their router are left out, since transformers holds them as stacked parameters, which are no modules.
    """
    found = {}
    for binding in bindings_of(family, config):
        matrix = all(len(shape) == 2 and name.startswith("layers.") for name, shape in zip(binding.ours, binding.our_shapes, strict=True))
        routed = any(".experts." in name or ".router." in name for name in binding.ours)
        if matrix and not routed and binding.theirs.endswith(".weight"):
            found[binding.theirs.removesuffix(".weight")] = binding
    return found


def choose_modules(modules: Mapping[str, Binding], targets: Sequence[str]) -> dict[str, Binding]:
    """Those of `modules` that `targets` name as PEFT's target_modules do: whole, or by the end of their names.

    Raises InputError for a target that names none.
    """
    if list(targets) == [ALL_LINEAR]:
        return dict(modules)
    for target in targets:
        if not any(_matches(name, target) for name in modules):
            known = dict.fromkeys(name.rpartition(".")[2] for name in modules)
            raise InputError(f"--lora-targets {target}: this model has no such module; it has {', '.join(known)} (or {ALL_LINEAR})")
    return {name: binding for name, binding in modules.items() if any(_matches(name, target) for target in targets)}


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a matrix (O, I): scale * B A, of `a` (r, I) and `b` (O, r), float32."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float

    def product(self) -> NDArray[np.float32]:
        """The whole of it, (O, I)."""
        result: NDArray[np.float32] = (self.b @ self.a) * np.float32(self.scale)
        return result


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read for a certain model."""

    path: Path
    base: str
    """The base model as the adapter names it, for messages."""
    fingerprint: str | None
    """The base's; adapters that llmctl did not write have none."""
    added: Mapping[str, LowRank]
    """The decoder's tensor -> what is added to it."""

    def check_base(self, found: "Fingerprint", *, where: object) -> None:
        """Raise InputError when `found` is not of the model that the adapter was trained on."""
        if self.fingerprint is not None and found.hexdigest() != self.fingerprint:
            raise InputError(
                f"{self.path}: the adapter was trained on another model than {where} (fingerprint {self.fingerprint[:12]},"
                f" this model's is {found.hexdigest()[:12]}); its base was {self.base}"
            )


class Fingerprint:
    """Tells models of one architecture apart by a sample of their numbers: the ends of three rows of each tensor.

    The numbers count as rounded to bf16, so that a float32 model and its bf16 copy are the same model, however the files are
    split and whatever they are called. It notices another model, not a flipped bit.
    """

    def __init__(self) -> None:
        self._parts: dict[str, bytes] = {}

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Take in a tensor of the decoder, (O, I) or (O,); floats, or bf16 as uint16."""
        rows = array[None] if array.ndim == 1 else array
        numbers = [rows[row, part] for row in (0, len(rows) // 2, len(rows) - 1) for part in (slice(_SAMPLED), slice(-_SAMPLED, None))]
        sample = np.concatenate(numbers)
        codes = sample if sample.dtype == np.uint16 else to_bf16(sample.astype(np.float32))
        self._parts[name] = repr(array.shape).encode() + codes.astype("<u2").tobytes()

    def hexdigest(self) -> str:
        """64 hex digits, whatever the order in which tensors came."""
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            digest.update(f"\n{name} ".encode() + self._parts[name])
        return digest.hexdigest()


class Merger:
    """Adds an adapter to tensors as they come by, and takes their fingerprint; does nothing where neither is wanted."""

    def __init__(self, adapter: Adapter | None, *, identify: bool = False) -> None:
        self._adapter = adapter
        self._fingerprint = Fingerprint() if identify or (adapter is not None and adapter.fingerprint is not None) else None

    @classmethod
    def of(cls, folder: Path | None, config: ModelConfig, family: Family, *, identify: bool = False) -> "Merger":
        """For the adapter in `folder`. Raises NotFoundError, InputError."""
        return cls(None if folder is None else read_adapter(folder, config, family), identify=identify)

    def added_to(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """The decoder's tensor `name` (bf16 as uint16) with what the adapter adds to it, float32 at least; else `array` itself."""
        if self._fingerprint is not None:
            self._fingerprint.add(name, array)
        added = None if self._adapter is None else self._adapter.added.get(name)
        if added is None:
            return array
        return (from_bf16(array) if array.dtype == np.uint16 else array) + added.product()

    def checked(self, where: Path) -> str | None:
        """The fingerprint, once every tensor has come by. Raises InputError when it is not that of the adapter's base."""
        if self._fingerprint is None:
            return None
        if self._adapter is not None:
            self._adapter.check_base(self._fingerprint, where=where)
        return self._fingerprint.hexdigest()


def base_reference(folder: Path) -> str:
    """The base model that an adapter names, as --model takes it. Raises InputError or NotFoundError."""
    raw = _read_config(folder)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {base!r}; give the base by --model and this by --adapter")
    return f"{base}@{revision}" if isinstance(revision, str) and not Path(base).exists() else base


def _read_config(folder: Path) -> dict[str, Any]:
    where = folder / ADAPTER_CONFIG
    raw = read_object(where)
    if raw is None:
        raise NotFoundError(f"{where}: no such file; an adapter is a folder with {ADAPTER_CONFIG} and {WEIGHTS_NAME}")
    if raw.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {raw.get('peft_type')!r}; LORA adapters of PEFT are read")
    for key, allowed in _UNREADABLE.items():
        if raw.get(key) not in allowed:
            raise InputError(f"{where}: {key} = {str(raw[key])[:80]!r} is not supported; merge it by PEFT first (merge_and_unload)")
    return raw


def read_adapter(folder: Path, config: ModelConfig, family: Family) -> Adapter:
    """Read the adapter in `folder` for a model of `config`. Raises NotFoundError or InputError that names what does not fit."""
    raw = _read_config(folder)
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise InputError(f"{folder / pickles[0]}: pickle refused, since reading one can run any code; {WEIGHTS_NAME} is wanted")
        raise NotFoundError(f"{weights}: no such file; an adapter has its weights there")
    file = TensorFile(weights)
    modules = adaptable_modules(config, family)
    pairs: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, entry in file.entries.items():
        module, part = _take_apart(name)
        if part is None or module not in modules:
            raise InputError(f"{weights}: tensor {name!r} belongs to no module of a {family.name} model that can be adapted")
        if entry.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{weights}: tensor {name!r} has the dtype {entry.dtype}, weights are {', '.join(WEIGHT_DTYPES)}")
        array = Stored(file, entry).array()
        pairs.setdefault(module, {})[part] = from_bf16(array) if array.dtype == np.uint16 else np.asarray(array, dtype=np.float32)
    if not pairs:
        raise InputError(f"{weights}: there are no adapters in it")
    added: dict[str, LowRank] = {}
    for module, pair in pairs.items():
        added |= _low_ranks(modules[module], pair, raw, where=f"{weights}: {module}")
    base = raw.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) else "not stated", file.metadata.get(FINGERPRINT_KEY), added)


def _take_apart(name: str) -> tuple[str, str | None]:
    """The module and "a" or "b" (None for a tensor of another kind)."""
    for ending, part in _PARTS.items():
        if name.startswith(_PREFIX) and name.endswith(ending):
            return name.removeprefix(_PREFIX).removesuffix(ending), part
    return name, None


def _low_ranks(binding: Binding, pair: Mapping[str, NDArray[np.float32]], raw: Mapping[str, Any], *, where: str) -> dict[str, LowRank]:
    if len(pair) < 2:
        raise InputError(f"{where}: lora_{'A' if 'b' in pair else 'B'} is missing")
    a, b = pair["a"], pair["b"]
    inputs, outputs = binding.our_shapes[0][1], sum(shape[0] for shape in binding.our_shapes)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != outputs or a.shape[0] != b.shape[1] or not len(a):
        raise InputError(f"{where}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit a matrix {[outputs, inputs]}")
    rank = a.shape[0]
    alpha = _alpha(binding.theirs.removesuffix(".weight"), raw, where=where)
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") is True else rank)
    rule = replace(binding.rule, transposed=False)  # B has the rows of the joined matrix as the decoder holds it
    parts = rule.to_ours(b, [(shape[0], rank) for shape in binding.our_shapes])
    return {name: LowRank(a, part, scale) for name, part in zip(binding.ours, parts, strict=True)}


def _alpha(module: str, raw: Mapping[str, Any], *, where: str) -> float:
    """lora_alpha, or what alpha_pattern says of the module; of PEFT's patterns, plain names are read."""
    value = raw.get("lora_alpha")
    patterns = raw.get("alpha_pattern") or {}
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        if not pattern.replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise InputError(f"{where}: alpha_pattern {pattern[:80]!r} is a regular expression; plain module names are read")
        if _matches(module, pattern):
            value = own
            break
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{where}: lora_alpha is {value!r}; a number is wanted")
    return float(value)


def adapter_config(
    *, chosen: Mapping[str, Binding], targets: Sequence[str], rank: int, alpha: float, dropout: float, base: str, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json for adapters on the modules `chosen`, which `targets` named."""
    if list(targets) == [ALL_LINEAR]:
        targets = list(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": any(binding.rule.transposed for binding in chosen.values()),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def peft_arrays(chosen: Mapping[str, Binding], ours: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's tensors from the decoder's `<module>.lora_a` and `.lora_b`, arrays of either kind.

    Raises InputError that names what is missing.
    """
    result = {}
    for module, binding in chosen.items():
        names = [name.removesuffix(".weight") for name in binding.ours]
        wanted = [f"{names[0]}.lora_a", *(f"{name}.lora_b" for name in names)]
        missing = [name for name in wanted if name not in ours]
        if missing:
            raise InputError(f"tensor {missing[0]!r} is missing{and_more(missing)}")
        a, *parts = (ours[name] for name in wanted)
        result[f"{_PREFIX}{module}.lora_A.weight"] = a
        result[f"{_PREFIX}{module}.lora_B.weight"] = replace(binding.rule, transposed=False).to_theirs(parts)
    return result


def our_arrays(chosen: Mapping[str, Binding], adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """The inverse of `peft_arrays`. Raises InputError when the adapter has other modules than those `chosen`."""
    result = {}
    for module, binding in chosen.items():
        names = [name.removesuffix(".weight") for name in binding.ours]
        if any(name not in adapter.added for name in binding.ours):
            raise InputError(f"{adapter.path}: there is no adapter of {module} in it")
        result[f"{names[0]}.lora_a"] = adapter.added[binding.ours[0]].a
        result |= {f"{name}.lora_b": adapter.added[f"{name}.weight"].b for name in names}
    return result
