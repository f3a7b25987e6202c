"""Reads the tokenizer files of a Hugging Face directory, and writes them. Knows file names; knows no ids and no model.

Follows transformers 5 (tokenization_utils_tokenizers.py) in what the configs add to tokenizer.json: missing special
tokens, and, where there is no tokenizer.json, `add_bos_token`, `add_eos_token` and `add_prefix_space`.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from llmctl.core.errors import InputError, NotFoundError
from llmctl.core.files import read_json, write_json, write_text
from llmctl.core.tokenizer.parts import backend_errors
from llmctl.core.tokenizer.tokenizer import Tokenizer

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_UNLIMITED = 10**9
"""A model_max_length from here on (transformers writes 1e30) means that there is none."""
_SLOW_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "tekken.json", "spm.model")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def load(path: Path) -> Tokenizer:
    """See Tokenizer.load."""
    if path.is_dir():
        return _load_directory(path, path / "tokenizer.json")
    if path.is_file():
        return _load_directory(path.parent, path)
    raise NotFoundError(f"{path}: no such tokenizer; a model directory or a tokenizer.json is wanted")


def _load_directory(folder: Path, file: Path) -> Tokenizer:
    config = _read_object(folder / "tokenizer_config.json")
    if file.is_file():
        backend = _read_backend(file)
        pair = False
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _read_pair(folder, add_prefix_space=config.get("add_prefix_space") is True)
        pair = True
    else:
        raise _no_tokenizer(folder)
    named = _named_tokens(folder, config, backend, pair=pair)
    _add_missing(backend, config, named)
    if pair and (config.get("add_bos_token") or config.get("add_eos_token")):
        _set_post_processor(backend, config, named)
    return Tokenizer.from_parts(
        backend,
        bos=named.get("bos_token"),
        eos=named.get("eos_token"),
        pad=named.get("pad_token"),
        chat_template=_chat_template(folder, config),
        model_max_length=_max_length(config),
    )


def _no_tokenizer(folder: Path) -> Exception:
    slow = next((name for name in _SLOW_FILES if (folder / name).is_file()), None)
    if slow is not None:
        return InputError(
            f"{folder} has only {slow}, for transformers' slow tokenizers; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes the tokenizer.json that is read here"
        )
    return NotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is wanted")
    return value


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    num_bytes = path.stat().st_size
    if num_bytes > _MAX_TOKENIZER_BYTES:
        raise InputError(f"{path} is {num_bytes:,} bytes, more than the {_MAX_TOKENIZER_BYTES:,} that a tokenizer may have")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    with backend_errors(f"{path}: not a tokenizer that can be read"):
        return tokenizers.Tokenizer.from_buffer(data)


def _read_pair(folder: Path, *, add_prefix_space: bool) -> tokenizers.Tokenizer:
    """GPT-2's two files, with GPT-2's byte-level pre-tokenisation."""
    with backend_errors(f"{folder / 'vocab.json'}: not a vocabulary that can be read"):
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _content(value: Any, where: str) -> str | None:
    """A token as configs write it: a string or {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {value!r} is not a token; text is wanted")
    return value or None


def _named_tokens(folder: Path, config: dict[str, Any], backend: tokenizers.Tokenizer, *, pair: bool) -> dict[str, str]:
    """bos_token, eos_token, ... from the tokenizer's configs; from the ids of config.json where those say nothing."""
    sources = [(folder / "tokenizer_config.json", config)]
    path = folder / "special_tokens_map.json"
    sources.append((path, _read_object(path)))
    named: dict[str, str] = {}
    for path, table in sources:
        for name in _NAMED:
            token = _content(table.get(name), f"{path}: {name}")
            if token is not None and name not in named and name not in (sources[0][1] if table is not config else ()):
                named[name] = token
    if pair and not named and backend.token_to_id("<|endoftext|>") is not None:
        return dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")  # GPT2Tokenizer's defaults
    if not named and not config:
        for name, token in _ids_of_model(folder, backend).items():
            named[name] = token
    return named


def _ids_of_model(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    model = _read_object(folder / "config.json")
    result = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token_id = model.get(f"{name}_id")
        if isinstance(token_id, list):
            token_id = token_id[0] if token_id else None
        if isinstance(token_id, int) and 0 <= token_id < 1 << 31:
            token = backend.id_to_token(token_id)
            if token is not None:
                result[name] = token
    return result


def _add_missing(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """Add the tokens that the config knows and tokenizer.json does not, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    table = config.get("added_tokens_decoder")
    for _, entry in sorted(table.items(), key=lambda item: _as_int(item[0])) if isinstance(table, dict) else ():
        content = _content(entry, "tokenizer_config.json: added_tokens_decoder")
        if content is None or content in known or not isinstance(entry, dict):
            continue
        flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry}
        backend.add_tokens([AddedToken(content, **flags)])
        known.add(content)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = list(extra.values()) if isinstance(extra, dict) else list(extra)
    contents = [_content(value, "tokenizer_config.json: extra_special_tokens") for value in extra]
    wanted = dict.fromkeys([*named.values(), *(c for c in contents if c is not None)])
    backend.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in wanted if c not in known])


def _as_int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"tokenizer_config.json: added_tokens_decoder: {text!r} is not an id") from error


def _set_post_processor(backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]) -> None:
    """What transformers makes of `add_bos_token` and `add_eos_token`. Where there is a tokenizer.json, that alone decides."""
    bos = named.get("bos_token") if config.get("add_bos_token") else None
    eos = named.get("eos_token") if config.get("add_eos_token") else None
    single = " ".join(part for part in (f"{bos}:0" if bos else "", "$A:0", f"{eos}:0" if eos else "") if part)
    pair = " ".join(part for part in (single, f"{bos}:1" if bos else "", "$B:1", f"{eos}:1" if eos else "") if part)
    specials = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        data = path.read_bytes()
        if len(data) > _MAX_TEMPLATE_BYTES:
            raise InputError(f"{path} is {len(data):,} bytes, more than the {_MAX_TEMPLATE_BYTES:,} that a template may have")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error
    template = _read_object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder}: the chat template is not text")
    return template


def _max_length(config: dict[str, Any]) -> int | None:
    value = config.get("model_max_length")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _UNLIMITED:
        return int(value)
    return None


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """See Tokenizer.save."""
    config: dict[str, Any] = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_text(directory / "tokenizer.json", tokenizer.to_json())  # as `tokenizers` lays it out: json's indent takes half a second
    write_json(directory / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    if tokenizer.chat_template is not None:
        write_text(directory / "chat_template.jinja", tokenizer.chat_template)
