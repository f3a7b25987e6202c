"""The errors carry the exit codes of the table, and their messages say what to do."""

import errno
import signal

import pytest

from llmctl.core import errors

TABLE = {
    errors.LlmctlError: 1,
    errors.UsageError: 2,
    errors.MissingExtraError: 2,
    errors.MissingSettingError: 2,
    errors.LostRankError: 1,
    errors.PartialFailure: 3,
    errors.InputError: 4,
    errors.WriteError: 5,
    errors.NonFiniteError: 6,
    errors.QualityGateError: 7,
    errors.NotFoundError: 10,
    errors.LockedError: 11,
}


def test_every_error_class_is_in_the_table() -> None:
    classes = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LlmctlError)}
    assert classes == {*TABLE, errors.Interrupted}


@pytest.mark.parametrize(("kind", "code"), TABLE.items())
def test_exit_codes(kind: type[errors.LlmctlError], code: int) -> None:
    assert kind.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_has_the_code_that_a_shell_shows(number: int, code: int) -> None:
    error = errors.Interrupted("saved at step 3", signal_number=number)
    assert (error.exit_code, error.signal_number, str(error)) == (code, number, "saved at step 3")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS])
def test_what_a_disk_refuses_is_a_write_failure(number: int) -> None:
    assert errors.is_write_failure(OSError(number, "x"))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EPIPE])
def test_a_wrong_path_or_right_is_not(number: int) -> None:
    assert not errors.is_write_failure(OSError(number, "x"))


def test_a_write_error_names_the_file_the_reason_and_the_room() -> None:
    error = errors.write_error(OSError(errno.ENOSPC, "No space left on device"), path="run/x", bytes_needed=5000, bytes_free=12)
    assert "run/x" in str(error)
    assert "no space left (5,000 bytes needed, 12 free)" in str(error)
    assert "run the same command again" in str(error)


def test_a_missing_extra_ends_with_the_line_that_installs_it() -> None:
    assert str(errors.MissingExtraError("reading .gguf", extra="gguf")).endswith("pip install 'llmctl[gguf]'")
