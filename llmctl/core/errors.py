"""The errors that a user can meet, each with its exit code. Knows nothing else of the program.

Every message is one line: what was found, what was wanted, what to do next, with the file, line or flag.
"""

import errno


class LlmctlError(Exception):
    """Base of all expected failures. Shown as one line; `exit_code` becomes the status of the process."""

    exit_code = 1


class UsageError(LlmctlError):
    """A flag, a config key or a combination of them is wrong. Raised before anything is created. Exit 2."""

    exit_code = 2


class MissingSettingError(UsageError):
    """A setting that a command cannot do without is not given; `--print-config` does without. Exit 2."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed. The message ends with the line that installs it. Exit 2."""

    def __init__(self, what: str, *, extra: str) -> None:
        super().__init__(f"{what} needs an extra that is not installed; install it with: pip install 'llmctl[{extra}]'")


class InputError(LlmctlError):
    """An input is bad, corrupt, unsafe, or does not match what it is used with. Exit 4."""

    exit_code = 4


class WriteError(LlmctlError):
    """A result could not be written: no space, an i/o error, a closed stdout. Exit 5."""

    exit_code = 5


class NonFiniteError(LlmctlError):
    """A loss, a gradient or logits are NaN or infinite. Exit 6."""

    exit_code = 6


class QualityGateError(LlmctlError):
    """A quality gate (`--fail-under`, `--fail-if-worse`) was not met. Exit 7."""

    exit_code = 7


class NotFoundError(LlmctlError):
    """A model, a checkpoint or data is not there. Exit 10."""

    exit_code = 10


class LockedError(LlmctlError):
    """Another run holds the lock of a folder or of an output file. Exit 11."""

    exit_code = 11


class LostRankError(LlmctlError):
    """Another process of the same job is gone, silent or cannot be reached. Exit 1."""


class PartialFailure(LlmctlError):
    """The job finished, but some records failed; the message names the file that lists them. Exit 3."""

    exit_code = 3


class Interrupted(LlmctlError):
    """The run was ended by a signal after its state had been saved; the message says how to go on.

    `signal_number` is SIGHUP, SIGINT or SIGTERM; the exit code is 128 + that number.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's text: other libraries add stack frames and hints below."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit reached"}
_WRITE_ERRNOS = {*_FULL, errno.EIO, errno.EROFS, errno.EBADF}


def is_write_failure(error: OSError) -> bool:
    """True when `error` means that a write could not be done, as against a wrong path or a missing right."""
    return error.errno in _WRITE_ERRNOS


def write_error(
    error: OSError,
    *,
    path: object,
    bytes_needed: int | None = None,
    bytes_free: int | None = None,
    then: str = "run the same command again",
) -> WriteError:
    """The WriteError that says why `path` could not be written, with the room needed and left if known (bytes).

    `then` is what to do once there is room.
    """
    reason = _FULL.get(error.errno or 0) or error.strerror or str(error)
    room = ""
    if bytes_needed is not None and bytes_free is not None:
        room = f" ({bytes_needed:,} bytes needed, {bytes_free:,} free)"
    return WriteError(f"cannot write {path}: {reason}{room}; free some space or choose another folder, then {then}")
