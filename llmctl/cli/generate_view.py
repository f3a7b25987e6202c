"""How `llmctl generate` shows texts: as they grow, or as JSON lines. Knows stdout and events; knows no model."""

from collections.abc import Callable
from typing import Any

from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.errors import Interrupted


class TextView:
    """Shows texts: the first one that is not done as it grows, the others when their turn comes; or JSON, one line a text.

    `token_text` is the tokenizer's, for log-probabilities in JSON; None leaves them out. With `code`, only the fenced code
    is shown, when the text is done; JSON has it beside the text.
    """

    def __init__(
        self, shell: Shell, *, num_samples: int, echo: str | None, code: bool = False, token_text: Callable[[int], str] | None = None
    ) -> None:
        self._json, self._num_samples, self._echo, self._shell = shell.json, num_samples, echo, shell
        self._token_text, self._code = token_text, code
        self._turn = 0
        self._grown: dict[int, str] = {}
        self._done: dict[int, Any] = {}
        self._num_shown = 0
        self._num_tokens = 0

    def token(self, event: Any) -> None:
        """A token came."""
        self._num_tokens += 1
        if self._json or self._code or not event.text:
            return
        self._grown[event.sample_index] = self._grown.get(event.sample_index, "") + event.text
        if event.sample_index == self._turn:
            self._show(self._grown[event.sample_index])

    def finished(self, event: Any, *, seed: int | None) -> None:
        """A text is done."""
        if self._json:
            out.write(self._json_line(event, seed))
            return
        self._done[event.sample_index] = event
        while self._turn in self._done:
            self._end(self._shown(self._done.pop(self._turn).text))

    def _shown(self, text: str) -> str:
        """What is shown of a text that is done."""
        if not self._code:
            return text
        from llmctl.core.infer.fences import fenced_code

        code = fenced_code(text)
        if code is None:
            self._shell.warn("the answer holds no fenced code and is shown whole")
        return text if code is None else code

    def _show(self, text: str) -> None:
        """Bring the text whose turn it is up to `text`."""
        if self._num_shown == 0 and self._echo is not None:
            out.write(self._echo, flush=False)
        out.write(text[self._num_shown :])
        self._num_shown = len(text)

    def _end(self, text: str) -> None:
        self._show(text)
        out.write("" if text.endswith("\n") else "\n")
        self._turn, self._num_shown = self._turn + 1, 0
        if self._turn < self._num_samples:
            out.write("---\n")
            if self._grown.get(self._turn):
                self._show(self._grown[self._turn])

    def close(self, signal_number: int | None) -> None:
        """Everything has been shown. Raises Interrupted when a signal ended it."""
        out.flush()
        if signal_number is not None:
            raise Interrupted(f"interrupted after {self._num_tokens} tokens", signal_number=signal_number)
        self._shell.detail(f"{self._num_tokens} tokens")

    def _json_line(self, event: Any, seed: int | None) -> bytes:
        from llmctl.core.infer.results import to_line

        row: dict[str, Any] = {"id": event.id}
        if self._num_samples > 1:
            row["sample"] = event.sample_index
        if self._echo is not None:
            row["prompt"] = self._echo
        row |= {
            "text": event.text,
            "finish": event.finish,
            "num_prompt_tokens": event.num_prompt_tokens,
            "num_new_tokens": event.num_new_tokens,
            "seed": seed,
            "token_ids": list(event.token_ids),
        }
        if self._code:
            from llmctl.core.infer.fences import fenced_code

            row["code"] = fenced_code(event.text)
        if event.stop is not None:
            row["stop"] = event.stop
        if event.score is not None:
            row["score"] = event.score
        if event.logprobs is not None and self._token_text is not None:
            from llmctl.core.infer.logprobs import logprob_rows

            row["logprobs"] = logprob_rows(event.token_ids, event.logprobs, self._token_text)
        return to_line(row)
