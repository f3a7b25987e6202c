"""Rows of OpenAI's batch files, and answers in their form. Knows that form; knows no file, tokenizer or model.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 50}}

becomes a plain row (see `rows`) and a `Reply`, which says how its answer is written. What would change the text and
cannot be done here is an error of that row; what could not change it (`user`, `metadata`, ...) is passed over.
Source: the OpenAI API's openapi.yaml, BatchRequestInput, BatchRequestOutput, CreateChatCompletionResponse, CreateCompletionResponse.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmctl.core.config.generate import ROW_PARAMETERS
from llmctl.core.errors import InputError
from llmctl.core.infer.events import Finished
from llmctl.core.infer.logprobs import MAX_LOGPROBS, TokenLogprob

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
MAX_CHOICES = 128
_REQUEST = ("custom_id", "method", "url", "body")
_TRANSLATED = ("messages", "prompt", "max_tokens", "max_completion_tokens", "n", "logprobs", "top_logprobs", "response_format")
_AS_THEY_ARE = ("seed", "stop", *ROW_PARAMETERS)
_PASSED_OVER = (
    *("model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"),
    *("stream_options", "best_of"),
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""Parameters that may be there as long as they ask for nothing."""


@dataclass(frozen=True)
class Reply:
    """How the answer to a row is written. None means that the row does not say."""

    kind: Literal["chat", "text"]
    num_choices: int | None = None
    num_logprobs: int | None = None


def is_request(value: Mapping[str, Any]) -> bool:
    """Whether a row is one of a batch file, rather than one of our own that carries fields of those names."""
    return "body" in value and ("url" in value or "custom_id" in value) and "prompt" not in value and "messages" not in value


def is_answer(row: Mapping[str, Any]) -> bool:
    """Whether a result row is one in OpenAI's form."""
    return "custom_id" in row and "response" in row


def plain_row(value: Mapping[str, Any]) -> tuple[dict[str, Any], Reply]:
    """A row of a batch file as a plain one, whose values are still to be checked, and its Reply. Raises InputError."""
    custom_id, url, body = value.get("custom_id"), value.get("url"), value["body"]
    if not isinstance(custom_id, str):
        raise InputError("custom_id: a string is wanted")
    if value.get("method", "POST") != "POST":
        raise InputError(f"method: {value['method']!r} is not POST")
    if url not in (CHAT_URL, TEXT_URL):
        raise InputError(f"url: {url!r} is not answered here; {CHAT_URL} and {TEXT_URL} are")
    if not isinstance(body, dict):
        raise InputError("body: an object is wanted")
    kind: Literal["chat", "text"] = "chat" if url == CHAT_URL else "text"
    known = (*_TRANSLATED, *_AS_THEY_ARE, *_PASSED_OVER)
    for name, given in body.items():
        if given is None or name in known:
            continue
        if given not in _NEUTRAL.get(name, ()):
            raise InputError(f"body.{name} cannot be done here; leave it out")
    plain: dict[str, Any] = {name: item for name, item in value.items() if name not in _REQUEST}
    plain |= {name: body[name] for name in _AS_THEY_ARE if body.get(name) is not None}
    plain["id"] = custom_id
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise InputError("body.max_tokens and body.max_completion_tokens are the same; give one")
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None:
            plain["max_tokens"] = body[name]
    other = "prompt" if kind == "chat" else "messages"
    if body.get(other) is not None:
        raise InputError(f"body.{other} does not go with {url}")
    if kind == "chat":
        plain["messages"] = _messages(body.get("messages"))
    else:
        plain["prompt"] = _prompt(body.get("prompt"))
    num_choices = _whole(body, "n", least=1, most=MAX_CHOICES)
    if (best_of := _whole(body, "best_of", least=1, most=MAX_CHOICES)) not in (None, num_choices or 1):
        if best_of is not None and best_of < (num_choices or 1):
            raise InputError(f"body.best_of is {best_of}, less than the n of {num_choices or 1}")
        plain["best_of"] = best_of
    if (schema := _schema(body.get("response_format"))) is not None:
        plain["json_schema"] = schema
    return plain, Reply(kind, num_choices, _num_logprobs(body, kind))


def _schema(wish: Any) -> dict[str, Any] | None:
    """The JSON schema that a response_format asks for, if any."""
    kind = wish.get("type") if isinstance(wish, dict) else None
    if wish is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = wish["json_schema"].get("schema") if kind == "json_schema" and isinstance(wish.get("json_schema"), dict) else None
    if not isinstance(schema, dict):
        raise InputError("body.response_format: type text, json_object, or json_schema with a schema is wanted")
    return schema


def _messages(messages: Any) -> Any:
    """Messages whose contents are text, as parts of the form or whole; `developer` is the newer name of `system`."""
    if not isinstance(messages, list):
        raise InputError("body.messages: a list is wanted")
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"body.messages[{number}]: an object is wanted")
        content, role = message.get("content"), message.get("role")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
                raise InputError(f"body.messages[{number}].content: only parts of the type text can be read")
            content = "".join(part["text"] for part in content)
        plain.append({"role": "system" if role == "developer" else role, "content": content})
    return plain


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise InputError("body.prompt: one string is wanted; give each prompt a row of its own")
    return prompt


def _num_logprobs(body: Mapping[str, Any], kind: str) -> int | None:
    if kind == "text":
        return _whole(body, "logprobs", least=0, most=MAX_LOGPROBS)
    wanted = body.get("logprobs")
    if wanted not in (None, True, False):
        raise InputError("body.logprobs: true or false is wanted")
    num_top = _whole(body, "top_logprobs", least=0, most=MAX_LOGPROBS)
    if num_top is not None and not wanted:
        raise InputError("body.top_logprobs needs logprobs: true")
    return (num_top or 0) if wanted else None


def _whole(body: Mapping[str, Any], name: str, *, least: int, most: int) -> int | None:
    number = body.get(name)
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise InputError(f"body.{name}: {number!r} is not a whole number from {least} to {most}")
    return number


def answer(reply: Reply, custom_id: str, texts: Sequence[Finished], *, model: str, token_text: Callable[[int], str]) -> dict[str, Any]:
    """The result row. Its ids follow from the row's, and `created` is 0, so that the same job gives the same bytes."""
    tag = _tag(custom_id)
    num_new = sum(text.num_new_tokens for text in texts)
    num_prompt = texts[0].num_prompt_tokens
    body = {
        "id": f"chatcmpl-{tag}" if reply.kind == "chat" else f"cmpl-{tag}",
        "object": "chat.completion" if reply.kind == "chat" else "text_completion",
        "created": 0,
        "model": model,
        "choices": [_choice(reply, index, text, token_text) for index, text in enumerate(texts)],
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new},
    }
    return _row(custom_id, 200, body)


def refusal(custom_id: str, message: str, *, is_fault_of_row: bool) -> dict[str, Any]:
    """The row of a request that failed, for the errors file."""
    kind = "invalid_request_error" if is_fault_of_row else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return _row(custom_id, 400 if is_fault_of_row else 500, {"error": error})


def _row(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    tag = _tag(custom_id)
    response = {"status_code": status, "request_id": f"req_{tag}", "body": body}
    return {"id": f"batch_req_{tag}", "custom_id": custom_id, "response": response, "error": None}


def _tag(custom_id: str) -> str:
    return hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _choice(reply: Reply, index: int, text: Finished, token_text: Callable[[int], str]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    logprobs = None if reply.num_logprobs is None or text.logprobs is None else list(zip(text.token_ids, text.logprobs, strict=True))
    if reply.kind == "chat":
        choice["message"] = {"role": "assistant", "content": text.text, "refusal": None}
        choice["logprobs"] = None if logprobs is None else {"content": _chat_logprobs(logprobs, token_text), "refusal": None}
    else:
        choice["text"] = text.text
        choice["logprobs"] = None if logprobs is None else _text_logprobs(logprobs, token_text)
    choice["finish_reason"] = "length" if text.finish == "length" else "stop"
    return choice


def _chat_logprobs(logprobs: Sequence[tuple[int, TokenLogprob]], token_text: Callable[[int], str]) -> list[dict[str, Any]]:
    def told(token: int, value: float) -> dict[str, Any]:
        text = token_text(token)
        # U+FFFD stands for bytes that are no character by themselves
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "replace"))}

    return [{**told(token, item.logprob), "top_logprobs": [told(id, value) for id, value in item.top]} for token, item in logprobs]


def _text_logprobs(logprobs: Sequence[tuple[int, TokenLogprob]], token_text: Callable[[int], str]) -> dict[str, Any]:
    tokens = [token_text(token) for token, _ in logprobs]
    offsets = [0]
    for token in tokens:
        offsets.append(offsets[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [item.logprob for _, item in logprobs],
        "top_logprobs": [{token_text(id): value for id, value in item.top} for _, item in logprobs],
        "text_offset": offsets[:-1],
    }
