"""Looks into a `tokenizers.Tokenizer`: what its parts are, what it can reach, what identifies it. Knows no special roles and no text."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from llmctl.core.errors import InputError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@contextlib.contextmanager
def backend_errors(what: str) -> Iterator[None]:
    """Turns what `tokenizers` raises within the block into an InputError that begins with `what`.

    It raises bare Exception, ValueError, OverflowError, and PanicException, a BaseException, where Rust gave up.
    """
    try:
        yield
    except BaseException as error:
        if type(error) in (Exception, ValueError, OverflowError) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {error}") from error
        raise


def is_special(backend: "tokenizers.Tokenizer", token: str) -> bool:
    """Whether `token` is an added token that decoding may skip."""
    added = backend.get_added_tokens_decoder().values()
    return any(entry.special and entry.content == token for entry in added)


def state_of(component: Any) -> dict[str, Any]:
    """The JSON of a part of a `tokenizers.Tokenizer` (its pickle state), empty for None."""
    return {} if component is None else dict(json.loads(component.__getstate__()))


def parts_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """A part and, for a Sequence, the parts in it."""
    inner = [part for key in ("pretokenizers", "decoders", "normalizers", "processors") for part in state.get(key, ())]
    return [state, *(deeper for part in inner for deeper in parts_of(part))]


def types_in(state: dict[str, Any]) -> set[str]:
    """The types of a part and of the parts in it."""
    return {part["type"] for part in parts_of(state) if "type" in part}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


def fingerprint_of(backend: "tokenizers.Tokenizer", *, bos: str | None, eos: str | None) -> str:
    """See Tokenizer.fingerprint. Token shards hold it, so what goes into it, and how, can never change."""
    content = parsed(backend.to_str())
    for key in ("truncation", "padding", "version"):
        content.pop(key, None)
    model = content["model"]
    if "merges" in model and not {list} >= set(map(type, model["merges"])):  # written "a b" by older versions of tokenizers
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    long = {key: model.pop(key) for key in ("vocab", "merges") if key in model}  # and without nulls
    content = _without_null({**content, "bos": bos, "eos": eos})
    parts = {key: _canonical(value) for key, value in {**content["model"], **long}.items()}
    texts = {**{key: _canonical(value) for key, value in content.items()}, "model": _joined(parts)}
    return hashlib.sha256(_joined(texts)).hexdigest()


def parsed(text: str) -> Any:
    """JSON that `tokenizers` wrote. orjson is quicker by half, which for a vocabulary of 50,000 is 30 ms."""
    try:
        import orjson
    except ImportError:
        return json.loads(text)
    return orjson.loads(text)


def json_text(value: Any) -> str:
    """`value` as JSON for `tokenizers` or gigatoken to read."""
    try:
        import orjson
    except ImportError:
        return json.dumps(value, ensure_ascii=False)
    return orjson.dumps(value).decode()


def _canonical(value: Any) -> bytes:
    """`value` as JSON with sorted keys and nothing escaped that need not be.

    orjson writes strings and integers as json does, in a tenth of the time, but not every float (1e-07).
    """
    is_vocab = isinstance(value, dict) and set(map(type, value.values())) == {int}
    is_merges = isinstance(value, list) and set(map(type, value)) == {list} and set(map(type, chain.from_iterable(value))) == {str}
    if is_vocab or is_merges:
        with contextlib.suppress(ImportError, TypeError):  # TypeError: a lone surrogate
            import orjson

            return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _joined(parts: Mapping[str, bytes]) -> bytes:
    """A JSON object of values that are JSON already, its keys sorted."""
    return b"{" + b",".join(_canonical(key) + b":" + parts[key] for key in sorted(parts)) + b"}"


def unknown_id(backend: "tokenizers.Tokenizer") -> int | None:
    """The id that the model itself gives for what it does not know."""
    import tokenizers.models

    model = backend.model
    if isinstance(model, tokenizers.models.Unigram):
        unknown = json.loads(model.__getstate__()).get("unk_id")
        return unknown if isinstance(unknown, int) else None
    return None if model.unk_token is None else backend.token_to_id(model.unk_token)


def looks_up_words(backend: "tokenizers.Tokenizer") -> bool:
    """Whether the model may give the id of a whole word that it finds in its table, a control token's name among them.

    BPE does not: it gets to a token only by merges.
    """
    import tokenizers.models

    return not isinstance(backend.model, tokenizers.models.BPE) or bool(backend.model.ignore_merges)


def measured_bytes(backend: "tokenizers.Tokenizer", tokens: Mapping[int, str]) -> dict[int, int]:
    """How many bytes of text each of `tokens` (id -> token) adds, for a tokenizer that is not byte-level.

    The first token of a text may be decoded differently (a space stripped), so each is measured after another one.
    """

    def decode(ids: list[int]) -> str:
        return str(backend.decode(ids, skip_special_tokens=False))

    anchor = next((i for i in sorted(tokens) if decode([i]).isalpha()), None)
    before = [] if anchor is None else [anchor]
    num_before = len(decode(before).encode("utf-8"))
    order = sorted(tokens)
    texts = backend.decode_batch([[*before, i] for i in order], skip_special_tokens=False)
    return {
        i: 1 if _BYTE_TOKEN.fullmatch(tokens[i]) else max(0, len(text.encode("utf-8")) - num_before)
        for i, text in zip(order, texts, strict=True)
    }
