"""`llmctl pretrain --report RUN`: reads run folders, writes one HTML page. Knows the report's pages; trains nothing."""

from llmctl.cli.shell import Shell
from llmctl.cli.streams import out
from llmctl.core.config.pretrain import PretrainConfig
from llmctl.core.errors import UsageError

_SIGN = b'<meta name="generator" content="llmctl '
_DEFAULT_NAME = "report.html"


def write_report(config: PretrainConfig, shell: Shell) -> None:
    """Write the page and say on stdout where it is. Raises what reading a run raises, and UsageError for a file that is no report."""
    from llmctl.core.files import write_text
    from llmctl.core.report.page import MAX_RUNS, render
    from llmctl.core.report.record import read_run

    if len(config.report) > MAX_RUNS:
        raise UsageError(f"--report: {len(config.report)} runs were given; a page shows at most {MAX_RUNS}")
    runs = [read_run(path) for path in config.report]
    target = config.report_file or config.report[0] / _DEFAULT_NAME
    if target.is_dir():
        raise UsageError(f"--report-file {target}: is a folder; give the name of a file")
    if target.exists():
        with target.open("rb") as file:
            if _SIGN not in file.read(1000):
                raise UsageError(f"--report-file {target}: is there already and is no report of llmctl; choose another name")
    write_text(target, render(runs))
    for run in runs:
        if run.num_bad_lines:
            shell.warn(f"{run.path}: {run.num_bad_lines} lines of metrics.jsonl could not be read and are left out")
    out.line(str(target))
