"""Rows of OpenAI's batch files: answered in their form, which OpenAI's own client reads, and with the texts of plain rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmctl.core.infer.rows import BadRow, Row, parse_row
from tests.cli.generate_tools import Llmctl

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def request(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "gpt-4o-mini", **body}}


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_the_answer_is_what_openais_client_reads_and_the_text_is_a_plain_rows(llmctl: Llmctl, chat_model: Path) -> None:
    openai_types = pytest.importorskip("openai.types")
    chat_types = pytest.importorskip("openai.types.chat")
    base = ("-m", chat_model, "-n", 9, "--seed", 7, "-t", 0.9, "-i", "-")
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "it"}]
    rows = jsonl(
        request("a", CHAT, messages=[{"role": "developer", "content": "S"}, {"role": "user", "content": parts}], max_completion_tokens=5),
        request("b", TEXT, prompt="Once", logprobs=2, temperature=0.5),
        request("c", CHAT, messages=user("x"), n=3, logprobs=True, top_logprobs=1, stop=["e"]),
    )
    found = llmctl(*base, stdin=rows)
    assert (found.code, found.last[:18]) == (0, "3 done, 0 failed; ")
    a, b, c = sorted(found.rows, key=lambda row: row["custom_id"])
    for row in (a, b, c):
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
    for row in (a, c):
        chat_types.ChatCompletion.model_validate(row["response"]["body"], strict=True)
    openai_types.Completion.model_validate(b["response"]["body"], strict=True)

    plain = llmctl(
        *("-m", chat_model, "-n", 9, "--seed", 7, "-t", 0.9, "-i", "-"),
        stdin=jsonl({"id": "a", "messages": [{"role": "system", "content": "S"}, *user("Say it")], "max_tokens": 5}),
    ).rows[0]
    body = a["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": plain["text"], "refusal": None}
    total = plain["num_prompt_tokens"] + plain["num_new_tokens"]
    usage = {"prompt_tokens": plain["num_prompt_tokens"], "completion_tokens": plain["num_new_tokens"], "total_tokens": total}
    assert (body["usage"], body["choices"][0]["finish_reason"]) == (usage, {"length": "length", "eos": "stop"}[plain["finish"]])

    raw = llmctl(*base, "--raw", "--logprobs", 2, stdin=jsonl({"id": "b", "prompt": "Once", "temperature": 0.5})).rows[0]
    choice = b["response"]["body"]["choices"][0]
    tokens = raw["logprobs"]
    if choice["finish_reason"] == "stop":  # with a chat template at hand, the end of a turn ends a text too
        tokens = tokens[: [token["token"] for token in tokens].index("<|im_end|>") + 1]
    assert choice["logprobs"]["tokens"] == [token["token"] for token in tokens]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([token["logprob"] for token in tokens], abs=1e-5)
    assert raw["text"].startswith(choice["text"])
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"])

    samples = llmctl(*base, "--num-samples", 3, "--stop", "e", stdin=jsonl({"id": "c", "messages": user("x")})).rows
    samples.sort(key=lambda row: row["sample"])
    assert [choice["message"]["content"] for choice in c["response"]["body"]["choices"]] == [row["text"] for row in samples]
    assert c["response"]["body"]["usage"]["completion_tokens"] == sum(row["num_new_tokens"] for row in samples)
    token = c["response"]["body"]["choices"][0]["logprobs"]["content"][0]
    assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
    assert len(token["top_logprobs"]) == 1


def test_mixed_with_plain_rows_a_job_goes_on_by_custom_id(llmctl: Llmctl, chat_model: Path, tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        rows.append(request(f"r{number}", CHAT, messages=user(f"row {number}"), n=1 + number % 2))
        rows.append({"id": f"p{number}", "prompt": f"row {number}", "label": number})
    rows.append({"id": "r0", "prompt": "an id and a custom_id are one name space"})
    (tmp_path / "in.jsonl").write_bytes(jsonl(*rows))
    base = ("-m", chat_model, "-n", 6, "--seed", 1, "-t", 0.8, "-i", tmp_path / "in.jsonl", "-b", 3)
    whole = llmctl(*base, "-o", tmp_path / "whole.jsonl")
    assert (whole.code, whole.last) == (3, f"llmctl: error: 1 of 13 rows failed; {tmp_path}/whole.errors.jsonl lists them")
    expected = (tmp_path / "whole.jsonl").read_bytes().splitlines()
    assert len(expected) == 12
    errors = [json.loads(line) for line in (tmp_path / "whole.errors.jsonl").read_bytes().splitlines()]
    assert errors == [{"id": "r0", "line": 13, "error": 'line 13: the id "r0" has been used before'}]
    # stopped after some rows, the last of them torn
    (tmp_path / "out.jsonl").write_bytes(b"\n".join(expected[:5]) + b"\n" + expected[5][:30])
    (tmp_path / "out.jsonl.run.json").write_bytes((tmp_path / "whole.jsonl.run.json").read_bytes())
    again = llmctl(*base, "-o", tmp_path / "out.jsonl")
    assert again.code == 3
    assert "7 done, 1 failed" in again.err
    assert sorted((tmp_path / "out.jsonl").read_bytes().splitlines()) == sorted(expected)


def test_shards_of_such_rows_are_joined_and_what_lacks_is_seen(llmctl: Llmctl, chat_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = [request("a", CHAT, messages=user("a")), request("b", CHAT, messages=user("b"), n=1), {"prompt": "c"}, {"prompt": "d"}]
    rows.append(request("e", CHAT, messages="none"))
    (tmp_path / "in.jsonl").write_bytes(jsonl(*rows))
    base = ("-m", chat_model, "-n", 4, "--seed", 1, "-i", tmp_path / "in.jsonl", "-o", out, "--num-samples", 2)
    assert [llmctl(*base, "--shard", shard).code for shard in ("1/2", "2/2")] == [3, 0]
    assert llmctl("--merge", "-o", out).code == 3
    found = [json.loads(line) for line in out.read_bytes().splitlines()]
    choices = {row["custom_id"]: len(row["response"]["body"]["choices"]) for row in found if "custom_id" in row}
    assert choices == {"a": 2, "b": 1}
    shard = tmp_path / "out.shard-1-of-2.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(line for line in lines if b'"custom_id": "a"' not in line))
    lacking = llmctl("--merge", "-o", out, "--overwrite")
    assert lacking.code == 4
    assert "2 of its 6 results are missing" in lacking.last


def test_a_refused_row_is_an_error_in_their_form(llmctl: Llmctl, model: Path) -> None:
    rows = jsonl(request("x", CHAT, messages=user("no template here")), request("y", TEXT, prompt="Once", max_tokens=2), {"prompt": ""})
    found = llmctl("-m", model, "-i", "-", "-t", 0, stdin=rows)
    assert found.code == 3
    by_id = {row.get("custom_id", row["id"]): row for row in found.rows}
    assert by_id["y"]["response"]["status_code"] == 200
    response = by_id["x"]["response"]
    assert (response["status_code"], by_id["x"]["error"]) == (400, None)
    assert response["body"]["error"]["type"] == "invalid_request_error"
    assert "messages need a chat template" in response["body"]["error"]["message"]
    assert by_id[3]["error"] == "line 3: the prompt is empty"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"custom_id": 5, "url": CHAT, "body": {}}, "custom_id: a string"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "url: '/v1/embeddings' is not answered here"),
        ({"custom_id": "a", "url": CHAT, "method": "GET", "body": {}}, "method: 'GET' is not POST"),
        ({"custom_id": "a", "url": CHAT, "body": []}, "body: an object"),
        (request("a", CHAT), "body.messages: a list"),
        (request("a", CHAT, messages=[3]), "body.messages[0]: an object"),
        (request("a", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "body.messages[0].content"),
        (request("a", CHAT, prompt="x"), "body.prompt does not go with"),
        (request("a", TEXT, prompt=["a", "b"]), "body.prompt: one string"),
        (request("a", TEXT, prompt="a", stream=True), "body.stream cannot be done here"),
        (request("a", TEXT, prompt="a", echo=True), "body.echo cannot"),
        (request("a", CHAT, messages=user("a"), tools=[{"type": "function"}]), "body.tools cannot"),
        (request("a", TEXT, prompt="a", n=0), "body.n: 0 is not a whole number from 1 to 128"),
        (request("a", TEXT, prompt="a", n=4, best_of=2), "body.best_of is 2, less than the n of 4"),
        (request("a", TEXT, prompt="a", response_format={"type": "poem"}), "body.response_format: type text, json_object"),
        (request("a", TEXT, prompt="a", max_tokens=4, max_completion_tokens=4), "are the same"),
        (request("a", TEXT, prompt="a", max_tokens=0), "max_tokens: 0 is not"),
        (request("a", CHAT, messages=user("a"), top_logprobs=1), "body.top_logprobs needs logprobs"),
        (request("a", TEXT, prompt="a", wisdom=11), "body.wisdom cannot be done here"),
        ({**request("a", TEXT, prompt="a"), "response": 1}, "the field 'response'"),
    ],
)
def test_what_cannot_be_done_is_told(row: dict[str, Any], words: str) -> None:
    parsed = parse_row(json.dumps(row).encode(), 2)
    assert isinstance(parsed, BadRow)
    assert parsed.error.startswith("line 2: ")
    assert words in parsed.error
    assert parsed.is_openai == isinstance(row["custom_id"], str)


def test_what_asks_for_nothing_is_passed_over_and_other_fields_are_carried() -> None:
    body = {"prompt": ["a"], "user": "me", "metadata": {"k": "v"}, "stream": False, "logit_bias": {}, "suffix": None, "top_k": 4}
    parsed = parse_row(json.dumps({**request("a", TEXT, **body), "label": 3}).encode(), 1)
    assert isinstance(parsed, Row)
    assert (parsed.id, parsed.prompt, dict(parsed.sampling), dict(parsed.extra)) == ("a", "a", {"top_k": 4}, {"label": 3})
    # a plain row may have fields of those names
    parsed = parse_row(b'{"prompt": "x", "url": "u", "body": "b", "custom_id": "c"}', 1)
    assert isinstance(parsed, Row)
    assert (parsed.reply, parsed.extra["custom_id"]) == (None, "c")
