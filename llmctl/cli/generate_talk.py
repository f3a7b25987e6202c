"""`llmctl generate --interactive`: a conversation on the terminal. Knows keys, commands and files; decides nothing about tokens."""

import dataclasses
import difflib
import os
import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.cli.generate import draw_seed, open_generator, read_preset, read_prompt
from llmctl.cli.generate_stats import Stats
from llmctl.cli.line_editor import LineEditor
from llmctl.cli.shell import Shell, stderr_line
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import out, stdin_is_terminal
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.errors import InputError, Interrupted, UsageError, WriteError

if TYPE_CHECKING:
    from llmctl.core.infer.events import Finished
    from llmctl.core.infer.generator import Generator
    from llmctl.core.infer.transcript import StoredTalk, Transcript

_COMMANDS = {
    "/help": "this list",
    "/undo": "take the last message and its answer back",
    "/retry": "another answer to the last message",
    "/system": "[TEXT]  show the system message or set it; /system - removes it",
    "/save": "FILE  write the talk to a new file, which --continue takes up",
    "/clear": "forget all that was said; the system message stays",
    "/exit": "end (Ctrl-D too)",
}
_HELP = """A line that ends with \\ goes on in the next one, and lines between \"\"\" and
\"\"\" are one message. Ctrl-C stops an answer and keeps what is there. A message
that begins with / is written with //."""
_RAW = "the model has no chat template: what you write and what it writes is one growing text; an empty line lets it go on"
_ENDS = ("/exit", "/quit", "/bye")
_COMMAND = re.compile(r"/[a-z?]*")


def run_talk(config: GenerateConfig, shell: Shell) -> None:
    """Talk until the user ends it."""
    if shell.json:
        raise UsageError("--json does not go with --interactive; --transcript FILE keeps the talk as JSON lines")
    if not stdin_is_terminal() or not out.is_terminal:
        stream = "stdin" if not stdin_is_terminal() else "stdout"
        raise UsageError(f"--interactive needs a terminal, and {stream} is none; in a pipe use --lines, to keep the talk --transcript FILE")
    first = None if (config.text, config.prompt, config.prompt_file) == (None, None, None) else read_prompt(config)
    with ExitStack() as stack:
        stored = None
        if config.continue_from is not None:
            from llmctl.core.infer.transcript import read_talk

            stored = read_talk(config.continue_from)
        transcript = _opened(config, shell, stack)
        _Conversation(config, shell, stored, transcript).run(first)


def _opened(config: GenerateConfig, shell: Shell, stack: ExitStack) -> "Transcript | None":
    """The file to which the talk is written, if any."""
    path = config.transcript or config.continue_from
    if path is None:
        return None
    from llmctl.core.infer.transcript import Transcript

    transcript = stack.enter_context(Transcript(path, flag="--transcript" if config.transcript is not None else "--continue"))
    if transcript.num_torn_bytes:
        shell.warn(f"{path}: cut off {transcript.num_torn_bytes:,} bytes of a row that was not whole")
    return transcript


class _Conversation:
    """The talk with its terminal and its file."""

    def __init__(self, config: GenerateConfig, shell: Shell, stored: "StoredTalk | None", transcript: "Transcript | None") -> None:
        from llmctl.core.checkpoint.resolve import DEFAULT_MODEL
        from llmctl.core.infer.defaults import merged
        from llmctl.core.infer.talk import Talk, TalkSettings
        from llmctl.core.infer.transcript import StoredTalk

        self._shell, self._transcript, self._wants_stats = shell, transcript, config.stats
        model = config.adapter or config.model or (DEFAULT_MODEL if stored is None else stored.model)  # an adapter names its base
        chat = config.chat if config.chat is not None or stored is None else (None if stored.chat else False)
        preset = read_preset(config)
        self._stats = Stats()
        generator = open_generator(
            dataclasses.replace(config, model=config.model if config.adapter else model, chat=chat, system=None), num_slots=1
        )
        uses_chat = generator.prompter.uses_chat
        if stored is not None and stored.chat and not uses_chat:
            where = f"--continue {config.continue_from}"
            raise InputError(f"{where}: is a chat, and {model} has no chat template here; give --chat-template FILE")
        if preset is not None and not uses_chat:
            raise InputError("--preset in a talk needs a model with a chat template; give --chat-template FILE")
        system = config.system
        if system is None:
            system = stored.system if stored is not None else (None if preset is None else preset.system_text())
        seed = config.seed if config.seed is not None else (draw_seed() if stored is None else stored.seed)
        params = merged(generator.params, config.given_sampling())
        settings = TalkSettings(
            params=params,
            seed=seed,
            stop=config.stop,
            max_new_tokens=config.max_new_tokens,
            ignore_eos=config.ignore_eos,
            min_new_tokens=config.min_new_tokens or 0,
        )
        self._is_greedy = params.is_greedy
        self.talk = Talk(generator, settings, system=system)
        self._stored = StoredTalk(model=_lasting(model), chat=uses_chat, seed=seed, system=system)
        self._editor = LineEditor(words=list(_COMMANDS))
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/?": self._help,
            "/undo": self._undo,
            "/retry": self._retry,
            "/system": self._system,
            "/save": self._save,
            "/clear": self._clear,
        }
        self._begin(config, stored)
        self._greet(generator, drawn=config.seed is None and stored is None and not params.is_greedy)

    def _begin(self, config: GenerateConfig, stored: "StoredTalk | None") -> None:
        """Take up a stored talk, and say in the transcript what it is."""
        goes_on_there = (
            self._transcript is not None and config.continue_from is not None and config.continue_from.samefile(self._transcript.path)
        )
        if stored is not None:
            self.talk.turns, self.talk.num_left_out = stored.turns, stored.num_left_out
            for turn in stored.turns:
                self._editor.remember(turn.message)
        now = self._now()
        if self._transcript is None or (stored is not None and goes_on_there and stored.head() == now.head()):
            return
        for row in now.rows():
            self._transcript.append(row)

    def _greet(self, generator: "Generator", *, drawn: bool) -> None:
        shell = self._shell
        shell.detail(generator.description)
        if generator.note is not None:
            shell.warn(generator.note)
        if drawn:
            shell.note(f"seed {self._stored.seed}")
        if not self.talk.uses_chat:
            shell.note(_RAW)
        if self.talk.turns:
            num_turns = len(self.talk.turns)
            tail = "; the last message has no answer: /retry asks for one" if self.talk.is_unanswered else ""
            shell.note(f"going on after {num_turns:,} turn{'s' if num_turns > 1 else ''}{tail}")
        shell.note(f"{generator.path.name} · Ctrl-C stops an answer, Ctrl-D ends, /help tells more")

    def run(self, first: str | None) -> None:
        """Messages and answers until the end."""
        if first is not None:
            self._editor.remember(first)
            self._say(first)
        while (message := self._editor.read()) is not None:
            word = message.split(maxsplit=1)[0] if message.strip() else ""
            if word in _ENDS:
                return
            if _COMMAND.fullmatch(word):
                self._command(word, message.strip().removeprefix(word).strip())
            else:
                self._say(message[1:] if message.startswith("//") else message)

    def _command(self, word: str, argument: str) -> None:
        if word not in self._commands:
            close = difflib.get_close_matches(word, list(_COMMANDS), n=1)
            stderr_line(f"there is no {word}; " + (f"did you mean {close[0]}?" if close else "/help lists the commands"))
            return
        try:
            self._commands[word](argument)
        except (UsageError, InputError) as error:
            stderr_line(str(error))

    def _say(self, message: str) -> None:
        try:
            self.talk.say(message)
        except InputError as error:
            if self.talk.uses_chat and not message.strip():
                return  # just the return key
            stderr_line(str(error))
            return
        self._record({"role": "user", "content": message})
        self._answer()

    def _answer(self) -> None:
        """Let the model answer the last message, as it comes."""
        from llmctl.core.infer.events import Failed, Finished, TokenOut, Warned

        text, stats = "", Stats() if self._wants_stats else None
        with stop_flag(insistent=False) as stop:
            try:
                for event in self.talk.answer(stop=stop):
                    if isinstance(event, TokenOut):
                        if stats is not None:
                            stats.token()
                        out.write(event.text)
                        text += event.text
                    elif isinstance(event, Finished):
                        out.write(event.text[len(text) :])
                        text = event.text
                        self._answered(event)
                    elif isinstance(event, Warned):
                        self._shell.warn(event.message)
                    elif isinstance(event, Failed):
                        stderr_line(f"no answer: {event.error}")
            except InputError as error:
                self.talk.undo()
                self._record({"kind": "undo"})
                stderr_line(str(error))
            signal_number = stop()
        if stats is not None:
            stats.tell_turn()
        if signal_number not in (None, signal.SIGINT):
            then = "" if self._transcript is None else f"; --continue {self._transcript.path} goes on"
            raise Interrupted(f"ended by a signal{then}", signal_number=signal_number)

    def _answered(self, event: "Finished") -> None:
        if not event.text.endswith("\n"):
            out.write("\n")
        if not self.talk.is_unanswered:
            self._record(
                {
                    "role": "assistant",
                    "content": event.text,
                    "finish": event.finish,
                    "num_prompt_tokens": event.num_prompt_tokens,
                    "num_new_tokens": event.num_new_tokens,
                    "num_left_out": self.talk.num_left_out,
                }
            )
        if event.finish == "interrupted":
            self._shell.note("(stopped)" if event.text else "(stopped before the answer began; /retry asks again)")
        elif event.finish == "length" and self.talk.uses_chat:
            self._shell.note(f"(cut after {event.num_new_tokens:,} tokens; --max-new-tokens allows more)")

    def _record(self, row: dict[str, Any]) -> None:
        if self._transcript is not None:
            self._transcript.append(row)

    def _now(self) -> "StoredTalk":
        return dataclasses.replace(self._stored, system=self.talk.system, turns=self.talk.turns, num_left_out=self.talk.num_left_out)

    def _help(self, _: str) -> None:
        for word, what in _COMMANDS.items():
            stderr_line(f"  {word:<9}{what}")
        stderr_line(_HELP)

    def _undo(self, _: str) -> None:
        turn = self.talk.undo()
        if turn is None:
            stderr_line("there is nothing to undo")
            return
        self._record({"kind": "undo"})
        self._shell.note(f"taken back: {_short(turn.message)}")

    def _retry(self, _: str) -> None:
        if not self.talk.retry():
            stderr_line("there is nothing to answer yet")
            return
        if self._is_greedy:
            self._shell.warn("with --temperature 0 the answer is always the same; give --temperature to draw another one")
        self._record({"kind": "retry"})
        self._answer()

    def _system(self, text: str) -> None:
        if text:
            self.talk.system = None if text == "-" else text
            self._record({"role": "system", "content": self.talk.system})
        self._shell.note("there is no system message" if self.talk.system is None else f"system: {self.talk.system}")

    def _save(self, name: str) -> None:
        from llmctl.core.infer.transcript import save_talk

        if not name:
            stderr_line("/save wants the name of a file, for instance /save talk.jsonl")
            return
        path = Path(name).expanduser()
        try:
            save_talk(self._now(), path)
        except WriteError as error:
            stderr_line(str(error))
            return
        self._shell.note(f"saved as {path}")

    def _clear(self, _: str) -> None:
        self.talk.clear()
        self._record({"kind": "clear"})
        self._shell.note("nothing has been said")


def _lasting(model: str) -> str:
    """The reference to a model, as it will be understood from another folder too."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
