"""The line editor's waiting, without a terminal. A talk on one is in test_generate_talk.py."""

import os
import signal
import threading

import pytest

from llmctl.cli import line_editor
from llmctl.core.errors import Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_cuts_no_wait_short_is_heard_before_the_next_key(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """As one between two waits of readline: it is sent to another thread here, which leaves the wait for a key as it is."""
    key, keyboard = os.pipe()
    waits = threading.Event()

    def read(_prompt: str) -> str:
        waits.set()
        os.read(key, 1)
        return "the next key"

    def send() -> None:
        waits.wait()
        signal.pthread_kill(threading.get_ident(), number)

    monkeypatch.setattr("builtins.input", read)
    before, sender = signal.getsignal(number), threading.Thread(target=send)
    at_last = threading.Timer(60, os.write, (keyboard, b"x"))
    sender.start()
    at_last.start()
    try:
        with pytest.raises(Interrupted) as raised:
            line_editor._typed("> ")
        assert at_last.is_alive(), "heard with the next key only"
    finally:
        at_last.cancel()
        sender.join()
        os.close(key)
        os.close(keyboard)
    assert raised.value.signal_number == number
    assert signal.getsignal(number) == before
