"""`llmctl export`: draws the events of core.export."""

import json
from dataclasses import asdict

from llmctl.cli.command import Command
from llmctl.cli.shell import Shell
from llmctl.cli.signals import raising
from llmctl.cli.streams import out
from llmctl.core.config.export import ExportConfig

_HELP = """Write a model in another format, and read it back to see that it is the same.

MODEL is whatever --model takes elsewhere. The result appears under its name only when it is whole and was verified."""
_EPILOG = """Examples:  llmctl export storyteller -o story.gguf --format gguf --dtype f16  ·
llmctl export model.gguf -o folder --dtype bf16  ·  llmctl export folder -o small --format quant --quant int4"""


def run(config: ExportConfig, shell: Shell) -> None:
    """Run the command."""
    from llmctl.core.export.events import Opened, Verified, Warned, Written
    from llmctl.core.export.export import export

    with raising("interrupted; nothing was kept"):
        for event in export(config):
            if isinstance(event, Warned):
                shell.warn(event.message)
            elif shell.json:
                out.line(json.dumps({"event": type(event).__name__, **asdict(event)}, ensure_ascii=False))
            elif isinstance(event, Opened):
                shell.note(f"model     {event.path}: {event.family}, {event.num_parameters:,} parameters, {event.num_format}")
            elif isinstance(event, Verified):
                out.line(_verified(event, is_vectors=config.format == "word2vec"))
            elif isinstance(event, Written):
                files = f"{event.num_files} files, " if event.num_files > 1 else ""
                out.line(f"wrote     {event.path} ({event.format}, {event.num_format}; {files}{event.num_bytes:,} bytes)")


COMMAND = Command("export", ExportConfig, run, _HELP, _EPILOG)


def _verified(event: "object", *, is_vectors: bool) -> str:
    from llmctl.core.export.events import Verified

    assert isinstance(event, Verified)
    if is_vectors:
        return f"verified  {event.num_tokens:,} vectors read back; largest difference {event.largest_difference:.3g}"
    rounding = (
        f"; rounding changed a logit by up to {event.rounding_difference:.3g}, the likeliest token at {1 - event.same_argmax:.1%} of places"
        if event.rounding_difference
        else ""
    )
    return (
        f"verified  read back by {event.reader}, {event.num_tokens} tokens; "
        f"largest difference of a logit {event.largest_difference:.3g}{rounding}"
    )
