"""`llmctl generate --show-prompt`: the tokens that a model would read. Opens no weights, except those of a .gguf file."""

import json

from llmctl.cli.generate import open_generator, read_preset, read_template, warn_of_cut
from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.generate import GenerateConfig


def show_prompt(config: GenerateConfig, shell: Shell, text: str) -> None:
    """One line a token on stdout: its id, its text as a JSON string, and "special" where it is one; or JSON in one line."""
    from llmctl.core.checkpoint import check_tokenizer, load_config, load_tokenizer, resolve_adapted
    from llmctl.core.infer.prompting import Prompter
    from llmctl.core.infer.results import to_line

    path, adapter = resolve_adapted(config.model, config.adapter)
    if path.suffix == ".gguf":
        generator = open_generator(config, num_slots=1)
        words, prompter = generator.tokenizer, generator.prompter
    else:
        where = path if config.tokenizer is None else config.tokenizer
        words = load_tokenizer(where, adapter=adapter if config.tokenizer is None else None)
        facts = load_config(path)[0]
        check_tokenizer(words, facts, where=where)
        words.chat_template = read_template(config) or words.chat_template
        prompter = Prompter(
            words,
            context=facts.max_positions,
            chat=config.chat,
            system=config.system,
            allow_special=config.allow_special,
            truncate=config.truncate,  # type: ignore[arg-type]  # checked by its choices
            preset=read_preset(config),
        )
    prompt = prompter.from_text(text, max_new_tokens=config.max_new_tokens)
    warn_of_cut(prompt, config, shell)
    if shell.json:
        row = {
            "num_prompt_tokens": len(prompt.ids),
            "token_ids": list(prompt.ids),
            "tokens": [words.token_text(id) for id in prompt.ids],
            "is_special": [id in words.special_ids for id in prompt.ids],
        }
        out.write(to_line(row))
        return
    for id in prompt.ids:
        mark = "\tspecial" if id in words.special_ids else ""
        out.line(f"{id}\t{json.dumps(words.token_text(id), ensure_ascii=False)}{mark}", flush=False)
    out.flush()
    shell.note(f"{len(prompt.ids):,} tokens")
