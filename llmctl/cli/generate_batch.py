"""`llmctl generate --input`: a batch job, from files or as a filter. Knows files, flags and progress; decides nothing about rows."""

import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmctl.cli.generate import draw_seed, open_generator
from llmctl.cli.generate_constraint import read_constraint, recorded
from llmctl.cli.generate_stats import Stats
from llmctl.cli.launch import is_launched, start_ranks
from llmctl.cli.shell import Shell
from llmctl.cli.signals import stop_flag
from llmctl.cli.streams import out, stdin_lines
from llmctl.core.config.generate import GenerateConfig
from llmctl.core.distributed.place import TORCHRUN
from llmctl.core.errors import InputError, Interrupted, LlmctlError, NotFoundError, PartialFailure, UsageError
from llmctl.core.files import check_out_file

if TYPE_CHECKING:
    from llmctl.core.infer.batch import BatchFinished
    from llmctl.core.infer.constrain import Constraint
    from llmctl.core.infer.generator import Generator
    from llmctl.core.infer.results import ResultFile
    from llmctl.core.infer.rows import BadRow, Row

_LATER = ("quant", "kv_dtype", "best_of", "logprobs", "ignore_eos", "min_new_tokens")
_TELL_EVERY_S = 30.0
_NUM_TOLD = 3
"""So many failures are told on stderr; all of them stand in the errors file."""


def run_job(config: GenerateConfig, shell: Shell) -> None:
    """Answer every row of the input."""
    shard = config.shard_numbers or torchrun_shard(os.environ)
    if is_launched(os.environ) and shard is not None and shard[0] > 1:
        shell.quiet = True  # the first process draws
    in_path, out_path = _check_files(config, shard)
    if shard is not None and config.seed is None and config.temperature != 0:
        raise UsageError("torchrun's ranks need --seed (or --temperature 0), so that all draw from the same one")
    from llmctl.core.infer.rows import file_lines, parsed_rows, polled_lines, sharded

    stats = Stats()
    with ExitStack() as stack:
        generator = open_generator(config, num_slots=config.batch_size)
        shell.detail(generator.description)
        if generator.note is not None:
            shell.warn(generator.note)
        constraint = read_constraint(config, generator)
        results, num_lines = None, None
        lines: Iterator[bytes | None] | Iterator[bytes]
        seed = config.seed
        drawn = draw_seed() if shard is None else 0  # shards without a seed are greedy but for rows that say otherwise: one for all
        if out_path is not None:
            from llmctl.core.infer.batch import input_facts
            from llmctl.core.infer.results import ResultFile

            results = stack.enter_context(ResultFile(out_path, overwrite=config.overwrite))
            rows = stack.enter_context(in_path.open("rb") if in_path is not None else _spooled(shell))
            input_hash, num_lines = input_facts(rows)
            rows.seek(0)
            job = _job(config, generator, input_hash) | recorded(constraint)
            if shard is not None:
                num_lines = sum(1 for _ in sharded((line for line in file_lines(rows) if line.strip()), shard))
                job |= {"shard": f"{shard[0]}/{shard[1]}", "num_results": num_lines * config.num_samples}
                rows.seek(0)
            seed = results.begin(job, seed=seed, drawn_seed=drawn)
            _tell_state(results, shell)
            lines = file_lines(rows)
        else:
            seed = drawn if seed is None else seed
            lines = polled_lines(sys.stdin.fileno()) if in_path is None else file_lines(stack.enter_context(in_path.open("rb")))
        if config.seed is None:
            shell.note(f"seed {seed}")
        wanted = parsed_rows(lines)
        if shard is not None:
            wanted = sharded(wanted, shard)
        is_shard = shard is not None and results is not None
        _answer(config, shell, generator, wanted, seed, results, num_lines, stats, constraint, is_shard=is_shard)


def run_processes(config: GenerateConfig, shell: Shell) -> bool:
    """With --nproc, answer the rows in several processes and join their shards; False where this process is to do the work."""
    path = Path(str(config.output))
    if config.nproc is not None and config.nproc > 1 and not is_launched(os.environ) and path.exists() and not config.overwrite:
        raise UsageError(f"--output {path}: is there already; choose another name, or use --overwrite")
    if not start_ranks(config.nproc, threads=config.threads):
        return False
    run_merge(config, shell)
    return True


def torchrun_shard(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """The shard of this rank, where torchrun started several."""
    rank, world_size = environ.get("RANK", ""), environ.get("WORLD_SIZE", "")
    if TORCHRUN not in environ or not rank.isdigit() or not world_size.isdigit() or int(world_size) < 2:
        return None
    return int(rank) + 1, int(world_size)


def run_merge(config: GenerateConfig, shell: Shell) -> None:
    """Join the shards of --output."""
    from llmctl.core.infer.merge import merge_shards

    path = Path(str(config.output))
    check_out_file(path)
    merged = merge_shards(path, overwrite=config.overwrite)
    shell.note(f"{path}: {merged.num_results:,} results of {merged.num_shards:,} shards")
    if merged.num_failed:
        raise PartialFailure(f"{merged.num_failed:,} rows had failed; {merged.errors_path} lists them")


def _check_files(config: GenerateConfig, shard: tuple[int, int] | None) -> tuple[Path | None, Path | None]:
    """The files of --input and --output, None for stdin and stdout. Refuses what cannot work before anything is loaded."""
    assert config.input is not None
    in_path = None if config.input == "-" else Path(config.input)
    out_path = None if config.output in (None, "-") else Path(str(config.output))
    if in_path is not None:
        if not in_path.exists():
            raise NotFoundError(f"--input {in_path}: no such file")
        if in_path.is_dir():
            raise UsageError(f"--input {in_path}: is a folder, a JSONL file is wanted")
        if not os.access(in_path, os.R_OK):
            raise UsageError(f"--input {in_path}: is not readable")
    elif sys.stdin is None:
        raise UsageError("--input -: stdin is closed; pipe the rows in or name a file")
    if out_path is None:
        if config.overwrite:
            raise UsageError("--overwrite needs --output FILE")
        return in_path, None
    if shard is not None:
        from llmctl.core.infer.merge import shard_path

        out_path = shard_path(out_path, shard)
    check_out_file(out_path)
    if out_path.exists() and not stat.S_ISREG(out_path.stat().st_mode):
        raise UsageError(f"--output {out_path}: is not a regular file; use --output - and a redirection")
    if in_path is not None and out_path.exists() and out_path.samefile(in_path):
        raise UsageError(f"--output {out_path}: is the input file; choose another name")
    return in_path, out_path


def _spooled(shell: Shell) -> IO[bytes]:
    """All of stdin in an unnamed file: a job that can go on must know its whole input."""
    shell.detail("reading all rows from stdin")
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    for line in stdin_lines():
        spool.write(line)
    spool.seek(0)
    return spool


def _job(config: GenerateConfig, generator: "Generator", input_hash: str) -> dict[str, Any]:
    """Everything that decides the texts, but the seed: what the sidecar of the result file records."""
    from llmctl.core.infer.batch import model_fingerprint
    from llmctl.core.infer.defaults import merged

    preset = generator.prompter.preset
    template = generator.tokenizer.chat_template if generator.prompter.uses_chat else None
    return {
        "input": input_hash,
        "model": model_fingerprint(generator.path),
        **({} if generator.adapter is None else {"adapter": model_fingerprint(generator.adapter)}),
        "tokenizer": generator.tokenizer.fingerprint,
        "chat_template": None if template is None else hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest(),
        "system": config.system,
        **({} if preset is None else {"preset": hashlib.sha256(preset.plain_text("{input}").encode("utf-8", "replace")).hexdigest()}),
        "dtype": config.dtype,
        **({"executor": "native"} if generator.executor_kind == "native" else {}),  # the same texts but for ties, so no mixture
        **asdict(merged(generator.params, config.given_sampling())),
        "stop": list(config.stop),
        "max_new_tokens": config.max_new_tokens,
        "num_samples": config.num_samples,
        "allow_special": config.allow_special,
        "truncate": config.truncate,
        # not there unless given, so that jobs of before these settings go on
        **{name: value for name in _LATER if (value := getattr(config, name)) not in (None, False)},
    }


def _tell_state(results: "ResultFile", shell: Shell) -> None:
    if results.num_torn_bytes:
        shell.warn(f"{results.path}: cut off {results.num_torn_bytes:,} bytes of a row that was not whole; it is made again")
    if results.num_results:
        shell.note(f"{results.path} has {results.num_results:,} results; going on with the rest")


def _answer(
    config: GenerateConfig,
    shell: Shell,
    generator: "Generator",
    rows: "Iterator[Row | BadRow | None]",
    seed: int,
    results: "ResultFile | None",
    num_lines: int | None,
    stats: Stats,
    constraint: "Constraint | None",
    *,
    is_shard: bool,
) -> None:
    from llmctl.core.infer.batch import BatchFinished, BatchSettings, RowDone, RowFailed, run_batch
    from llmctl.core.infer.defaults import merged
    from llmctl.core.infer.events import Warned

    settings = BatchSettings(
        params=merged(generator.params, config.given_sampling()),
        seed=seed,
        stop=config.stop,
        max_new_tokens=config.max_new_tokens,
        num_samples=config.num_samples,
        best_of=config.best_of,
        num_logprobs=config.logprobs,
        ignore_eos=config.ignore_eos,
        min_new_tokens=config.min_new_tokens or 0,
        constraint=constraint,
        ordered=config.ordered,
        tell_line=is_shard,
    )
    first_error, num_failed, num_prompt_tokens, started_s = "", 0, 0, time.monotonic()
    stats.start()
    num_before = 0 if results is None else results.num_results
    progress = Progress(shell, num_lines, config.num_samples, num_before, results_on_stdout=results is None)
    with stop_flag() as stop, progress:
        for event in run_batch(rows, generator, settings, results=results, stop=stop):
            if isinstance(event, RowDone):
                progress.row(event.num_new_tokens, event.num_texts)
                num_prompt_tokens += event.num_prompt_tokens
            elif isinstance(event, RowFailed):
                progress.row(0, event.num_texts)
                num_failed += 1
                first_error = first_error or event.error
                if num_failed <= _NUM_TOLD:
                    shell.warn(event.error)
            elif isinstance(event, Warned):
                shell.warn(event.message)
            if isinstance(event, RowDone | RowFailed) and results is None:
                from llmctl.core.infer.results import to_line

                out.write(to_line(event.row))
            elif isinstance(event, BatchFinished):
                summary = event
        signal_number = stop()
    if config.stats:
        stats.tell_batch(num_prompt_tokens=num_prompt_tokens, num_new_tokens=summary.num_new_tokens, speculator=generator.engine.speculator)
    _conclude(summary, shell, config, results, first_error, signal_number, elapsed_s=time.monotonic() - started_s)


def _conclude(
    summary: "BatchFinished",
    shell: Shell,
    config: GenerateConfig,
    results: "ResultFile | None",
    first_error: str,
    signal_number: int | None,
    *,
    elapsed_s: float,
) -> None:
    """Say how it went, and turn it into an exit code."""
    if results is not None:
        results.close()
    if summary.num_cut:
        shell.warn(f"{summary.num_cut:,} prompts were too long and were cut on the {config.truncate}; their results say num_cut")
    if signal_number is not None:
        kept = (
            f"{results.path} holds {results.num_results:,} results; run the same command to go on"
            if results is not None
            else "rows are left"
        )
        raise Interrupted(f"interrupted; {kept}", signal_number=signal_number)
    num_good = summary.num_done + summary.num_skipped
    launched = is_launched(os.environ)  # the launcher tells what failed of all shards, and must not take one for broken
    if num_good + summary.num_failed == 0 and launched:
        return  # fewer rows than processes
    if num_good + summary.num_failed == 0:
        raise InputError(f"--input {config.input}: holds no rows; each line is a JSON object with a prompt or messages")
    rate = summary.num_new_tokens / elapsed_s if elapsed_s > 0 else 0.0
    shell.note(f"{summary.num_done:,} done, {summary.num_failed:,} failed; {summary.num_new_tokens:,} tokens, {rate:,.1f} a second")
    if summary.num_failed == 0 or launched:
        return
    where = f"{results.errors_path} lists them" if results is not None else "their rows say why"
    if num_good == 0:
        raise LlmctlError(f"all {summary.num_failed:,} rows failed; the first: {first_error}")
    raise PartialFailure(f"{summary.num_failed:,} of {num_good + summary.num_failed:,} rows failed; {where}")


class Progress:
    """Rows, tokens a second and the time left on stderr: a bar on a terminal, elsewhere a line every half minute.

    No bar is drawn where the results go to a terminal, among which it would stand. `now_s` is a clock that never goes back.
    """

    def __init__(
        self,
        shell: Shell,
        num_lines: int | None,
        num_samples: int,
        num_done: int,
        *,
        results_on_stdout: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._results_on_stdout = results_on_stdout
        self._shell, self._num_before, self._num_done, self._now_s = shell, num_done, num_done, now_s
        self._total = None if num_lines is None else num_lines * num_samples
        self._num_tokens = 0
        self._started_s = self._told_s = now_s()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._shell.live and not (self._results_on_stdout and out.is_terminal):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

            self._bar = self._shell.progress(
                TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
            )
            self._bar.start()
            self._task = self._bar.add_task("rows", total=self._total, completed=self._num_done, rate="")
        return self

    def row(self, num_tokens: int, num_texts: int) -> None:
        """One more result, which stands for so many texts."""
        self._num_tokens += num_tokens
        self._num_done += num_texts
        now_s = self._now_s()
        if self._bar is not None:
            rate = self._num_tokens / max(now_s - self._started_s, 1e-6)
            self._bar.update(self._task, advance=num_texts, rate=f"{rate:,.1f} tokens/s")
        elif now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            self._shell.note(self._line(now_s - self._started_s))

    def _line(self, elapsed_s: float) -> str:
        of, left = "", ""
        if self._total is not None:
            of = f" of {self._total:,}"
            seconds = round(elapsed_s * (self._total - self._num_done) / max(self._num_done - self._num_before, 1))
            left = f", about {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        return f"{self._num_done:,}{of} rows, {self._num_tokens / elapsed_s:,.1f} tokens/s{left}"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
