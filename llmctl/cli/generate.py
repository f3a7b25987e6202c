"""`llmctl generate`: reads prompts, draws the events of core.infer. Knows streams and flags; decides nothing about tokens."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.cli.command import Command
from llmctl.cli.generate_constraint import read_constraint
from llmctl.cli.generate_stats import Stats
from llmctl.cli.generate_view import TextView
from llmctl.cli.shell import Shell, collector_off
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import decode_utf8, out, read_stdin, stdin_has_input, stdin_is_terminal
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.errors import InputError, LlmctlError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmctl.core.infer.events import Event
    from llmctl.core.infer.generator import Generator
    from llmctl.core.infer.preset import Preset
    from llmctl.core.infer.prompting import Prompt

MAX_PROMPT_BYTES = 4 << 20

_HELP = """Generate text from a prompt, from stdin, or for each row of a JSONL file.

The prompt is the argument, or what is piped in, or both: piped text comes first, then a space, then the argument. One
line break at the end of piped text or of a file does not count. The text goes to stdout as it is made."""
_EPILOG = """\b
Examples:
  llmctl generate "Once upon a time"
  cat article.txt | llmctl generate "In three lines:"
  llmctl generate --interactive --transcript talk.jsonl
  llmctl generate -i prompts.jsonl -o answers.jsonl     (again: goes on)"""


def run(config: GenerateConfig, shell: Shell) -> None:
    """Run the command."""
    if config.input is not None:
        from llmctl.cli.generate_batch import run_job, run_processes

        if not run_processes(config, shell):
            run_job(config, shell)
        return
    if config.merge:
        from llmctl.cli.generate_batch import run_merge

        run_merge(config, shell)
        return
    if config.interactive:
        from llmctl.cli.generate_talk import run_talk

        run_talk(config, shell)
        return
    if config.lines:
        from llmctl.cli.generate_lines import run_lines

        run_lines(config, shell)
        return
    if config.verify_cache:
        _verify_cache(config, shell)
        return
    text = read_prompt(config)
    if config.show_prompt:
        from llmctl.cli.generate_prompt import show_prompt

        show_prompt(config, shell, text)
        return
    if config.logprobs is not None and not shell.json:
        raise UsageError("--logprobs needs --json: they have no place in plain text")
    stats = Stats()
    generator = open_generator(config, num_slots=min(max(config.num_samples, config.best_of or 1), config.batch_size))
    if config.num_beams > 1:
        _search(config, shell, generator, text, stats)
    else:
        _sample(config, shell, generator, text, stats)


COMMAND = Command("generate", GenerateConfig, run, _HELP, _EPILOG)


def _verify_cache(config: GenerateConfig, shell: Shell) -> None:
    from llmctl.core.checkpoint import resolve_adapted
    from llmctl.core.infer.opening import verify_packed

    path, adapter = resolve_adapted(config.model, config.adapter)
    found = verify_packed(path, dtype=config.dtype, quant=config.quant, adapter=adapter)  # type: ignore[arg-type]  # checked by its choices
    shell.note("no packed weights are kept for this model" if found is None else "the packed weights and their sources are whole")
    if found is not None:
        out.line(found)


def open_generator(config: GenerateConfig, *, num_slots: int) -> "Generator":
    """Load what the flags name."""
    with collector_off():
        return _open_generator(config, num_slots=num_slots)


def _open_generator(config: GenerateConfig, *, num_slots: int) -> "Generator":
    from llmctl.core.infer.generator import Generator

    return Generator.open(
        config.model,
        adapter=config.adapter,
        tokenizer=config.tokenizer,
        chat_template=read_template(config),
        device=config.device,
        dtype=config.dtype,
        quant=config.quant,  # type: ignore[arg-type]  # checked by its choices
        threads=config.threads,
        executor=config.executor,  # type: ignore[arg-type]  # checked by its choices
        num_slots=num_slots,
        chat=config.chat,
        system=config.system,
        allow_special=config.allow_special,
        truncate=config.truncate,  # type: ignore[arg-type]  # checked by its choices
        preset=read_preset(config),
        speculate=config.speculation,
        batch_tokens=config.token_budget,
        kv_dtype=config.kv_dtype,  # type: ignore[arg-type]  # checked by its choices
        draft_model=config.draft_model,
        cuda_graphs=config.cuda_graphs,
    )


def read_preset(config: GenerateConfig) -> "Preset | None":
    """The preset of --preset, filled in by --set."""
    if config.preset is None:
        return None
    from llmctl.core.infer.preset import load_preset

    return load_preset(config.preset, config.set)


def read_template(config: GenerateConfig) -> str | None:
    """The chat template of --chat-template."""
    if config.chat_template is None:
        return None
    return decode_utf8(_read_file(config.chat_template, "--chat-template"), where=f"--chat-template {config.chat_template}")


def read_prompt(config: GenerateConfig) -> str:
    """The prompt: a file or piped stdin, and the argument after it. Raises UsageError when there is nothing."""
    argument = config.text if config.text is not None else config.prompt
    pieces = []
    file_is_stdin = config.prompt_file == Path("-")
    if config.prompt_file is not None and not file_is_stdin:
        pieces.append(_as_text(_read_file(config.prompt_file, "--prompt-file"), where=f"--prompt-file {config.prompt_file}"))
    if argument == "-" or file_is_stdin or (config.prompt_file is None and (stdin_has_input() or argument is None)):
        if stdin_is_terminal() and argument is None:
            raise UsageError(
                'no prompt: give one as an argument, for instance llmctl generate "Once upon a time", pipe it in, or use --interactive'
            )
        pieces.append(_as_text(read_stdin(max_bytes=MAX_PROMPT_BYTES), where="stdin"))
    if argument is not None and argument != "-":
        pieces.append(_argument_text(argument))
    prompt = " ".join(piece for piece in pieces if piece)
    if not prompt:
        raise UsageError("the prompt is empty; give some text as an argument or on stdin")
    return prompt


def _as_text(data: bytes, *, where: str) -> str:
    text = decode_utf8(data, where=where)
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _argument_text(argument: str) -> str:
    """Bytes of the command line that are no UTF-8 come as lone surrogates."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt on the command line is not valid UTF-8 at character {error.start}") from error
    return argument


def _read_file(path: Path, flag: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"{flag} {path}: no such file") from error
    except OSError as error:
        raise UsageError(f"{flag} {path}: {(error.strerror or str(error)).lower()}") from error
    if len(data) > MAX_PROMPT_BYTES:
        raise InputError(f"{flag} {path}: more than {MAX_PROMPT_BYTES:,} bytes, the limit of a prompt")
    return data


def draw_seed() -> int:
    """A seed for those who did not choose one; small enough to be typed again."""
    return int.from_bytes(os.urandom(4), "big")  # `secrets` would import what nothing else here needs


def _sample(config: GenerateConfig, shell: Shell, generator: "Generator", text: str, stats: Stats) -> None:
    from llmctl.core.infer.best import best_of
    from llmctl.core.infer.defaults import merged
    from llmctl.core.infer.events import Failed, Finished, TokenOut, Warned

    params = merged(generator.params, config.given_sampling())
    seed = config.seed if config.seed is not None else draw_seed()
    constraint = read_constraint(config, generator)
    prompt = _prompt(config, shell, generator, text)
    shell.detail(generator.description)
    if generator.note is not None:
        shell.warn(generator.note)
    num_made = max(config.num_samples, config.best_of or 1)
    if params.is_greedy and num_made > 1:
        shell.warn("all samples will be equal: with --temperature 0 nothing is drawn at random")
    if config.seed is None and not params.is_greedy:
        shell.note(f"seed {seed}")
    requests = [
        generator.request_for(
            prompt,
            id=1,
            sample_index=index,
            seed=seed,
            stop=config.stop,
            params=params,
            num_logprobs=0 if config.logprobs is None and config.best_of is not None else config.logprobs,
            ignore_eos=config.ignore_eos,
            min_new_tokens=config.min_new_tokens or 0,
            constraint=constraint,
        )
        for index in range(num_made)
    ]
    view = _view(config, shell, text, generator)
    stats.start(num_prompt_tokens=len(prompt.ids))
    with stop_flag() as stop:
        events = generator.engine.run(requests, stop=stop)
        if config.stats:
            events = _timed(events, stats)
        if config.best_of is not None:
            events = best_of(events, lambda _: (num_made, config.num_samples))
        for event in events:
            if isinstance(event, TokenOut):
                view.token(event)
            elif isinstance(event, Finished):
                view.finished(event, seed=None if params.is_greedy else seed)
                if constraint is not None and event.finish in ("length", "stop"):
                    shell.warn(f"the answer is not whole: it was cut after {event.num_new_tokens:,} tokens")
            elif isinstance(event, Warned):
                shell.warn(event.message)
            elif isinstance(event, Failed):
                raise LlmctlError(f"{event.error}; use a shorter prompt, fewer new tokens or a smaller model")
        signal_number = stop()
    if config.stats:
        stats.tell(generator.engine.speculator)
    view.close(signal_number)


def _timed(events: "Iterator[Event]", stats: Stats) -> "Iterator[Event]":
    from llmctl.core.infer.events import TokenOut

    for event in events:
        if isinstance(event, TokenOut):
            stats.token()
        yield event


def _view(config: GenerateConfig, shell: Shell, text: str, generator: "Generator") -> TextView:
    return TextView(
        shell,
        num_samples=config.num_samples,
        echo=text if config.echo else None,
        code=config.code,
        token_text=None if config.logprobs is None else generator.tokenizer.token_text,
    )


def _search(config: GenerateConfig, shell: Shell, generator: "Generator", text: str, stats: Stats) -> None:
    from llmctl.core.infer.beam import BeamParams
    from llmctl.core.infer.events import Finished

    prompt = _prompt(config, shell, generator, text)
    shell.detail(generator.description)
    if generator.note is not None:
        shell.warn(generator.note)
    penalty = config.repetition_penalty if config.repetition_penalty is not None else generator.params.repetition_penalty
    params = BeamParams(
        num_beams=config.num_beams,
        length_penalty=config.length_penalty,
        early_stopping=config.early_stopping,  # type: ignore[arg-type]  # checked by its choices
        repetition_penalty=penalty,
    )
    view = _view(config, shell, text, generator)
    stats.start(num_prompt_tokens=len(prompt.ids))
    with stop_flag() as stop:
        for event in generator.search(prompt, params, num_texts=config.num_samples, stop=stop):
            if isinstance(event, Finished):
                view.finished(event, seed=None)
            else:
                stats.token()
        signal_number = stop()
    if config.stats:
        stats.tell()
    view.close(signal_number)


def _prompt(config: GenerateConfig, shell: Shell, generator: "Generator", text: str) -> "Prompt":
    prompt = generator.prompter.from_text(text, max_new_tokens=config.max_new_tokens)
    warn_of_cut(prompt, config, shell)
    return prompt


def warn_of_cut(prompt: "Prompt", config: GenerateConfig, shell: Shell) -> None:
    """Say how much of a prompt was cut off, if any."""
    if prompt.num_cut:
        shell.warn(
            f"the prompt of {len(prompt.ids) + prompt.num_cut:,} tokens was cut to {len(prompt.ids):,} on the {config.truncate}, "
            f"to leave room for {prompt.max_new_tokens:,} new ones"
        )
