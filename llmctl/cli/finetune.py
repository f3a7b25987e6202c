"""`llmctl finetune`: draws the events of core.train."""

from llmctl.cli.command import Command
from llmctl.cli.launch import start_ranks
from llmctl.cli.pretrain import check_out_dir_of, with_stored
from llmctl.cli.shell import Shell
from llmctl.core.config.finetune import FinetuneConfig

_HELP = """Teach a model answers, from rows in chat or instruction form.

Rows are JSONL (or a JSON array, also .gz or .zst) of one form a file: messages, conversations (ShareGPT), instruction/input/output,
instruction/instances, or prompt/completion. The loss is on the answers and the token that ends them. Rows are packed into
sequences of --seq-len, and attention stays within each row. A run folder comes out, as from pretrain: its checkpoints are
Hugging Face model directories with tokenizer and chat template, and a run stopped in any way goes on with --resume, bit for bit."""


def run(config: FinetuneConfig, shell: Shell) -> None:
    """Run the command."""
    from llmctl.cli.signals import stop_flag
    from llmctl.cli.training_view import draw

    if not config.dry_run and start_ranks(config.nproc, threads=config.threads):
        return
    config = with_stored(config, shell)
    check_out_dir_of(config)
    with stop_flag() as stop:
        from llmctl.core.train.finetune import train

        draw(train(config, stop=stop, save_requested=stop.take_save_request), shell, config)


COMMAND = Command("finetune", FinetuneConfig, run, _HELP)
