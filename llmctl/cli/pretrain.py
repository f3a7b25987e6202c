"""`llmctl pretrain`: draws the events of core.train."""

from dataclasses import replace
from typing import Any

from llmctl.cli.command import Command
from llmctl.cli.launch import start_ranks
from llmctl.cli.shell import Shell
from llmctl.core.config.pretrain import RESUME_ONLY, PretrainConfig
from llmctl.core.errors import UsageError
from llmctl.core.files import check_out_dir

_HELP = """Train a model from token shards.

Packed text goes in (see `llmctl tokenize pack`), a run folder comes out: checkpoints that are Hugging Face model
directories, metrics.jsonl and status.json. A run stopped in any way goes on with --resume, bit for bit."""
_BUDGETS = ("max_steps", "max_tokens", "epochs", "max_time")
_SOURCES = ("depth", "model_config", "model")


def run(config: PretrainConfig, shell: Shell) -> None:
    """Run the command."""
    if config.report:
        from llmctl.cli.report import write_report

        write_report(config, shell)
        return
    from llmctl.cli.signals import stop_flag
    from llmctl.cli.training_view import draw

    if not config.dry_run and start_ranks(config.nproc, threads=config.threads):
        return
    config = with_stored(config, shell)
    check_out_dir_of(config)
    with stop_flag() as stop:
        from llmctl.core.train.pretrain import train

        draw(train(config, stop=stop, save_requested=stop.take_save_request), shell, config)


COMMAND = Command("pretrain", PretrainConfig, run, _HELP)


def check_out_dir_of(config: Any) -> None:
    """Refuse a bad --out-dir before torch is imported."""
    if config.out_dir is not None:
        if not (config.resume or config.auto_resume or config.resume_from is not None):
            check_out_dir(config.out_dir)
    elif not config.dry_run:
        raise UsageError("--out-dir is missing: the run folder for checkpoints and metrics")


def with_stored(config: Any, shell: Shell) -> Any:
    """On a resume, the settings of the run stand in for those that were not given."""
    from llmctl.core.config.stored import overlay
    from llmctl.core.runlog import CONFIG_NAME

    if config.out_dir is None and config.resume_from is not None:
        config = replace(config, out_dir=config.resume_from.parent)
    if not (config.resume or config.auto_resume or config.resume_from is not None) or config.out_dir is None:
        return config
    file = config.out_dir / CONFIG_NAME
    if not file.is_file():
        return config
    origins = {**shell.origins, "out_dir": "flag"}
    if origins.get("model") == "environment LLMCTL_MODEL":
        origins["model"] = "default"  # the model that generate and eval take anyway says nothing about this run
    given = {name for name, origin in origins.items() if origin != "default"}
    keep = {*RESUME_ONLY, "threads", "device"}
    for group in (_BUDGETS, _SOURCES):
        if given & set(group):
            keep |= set(group)
    return overlay(config, file, origins=origins, keep=keep)
