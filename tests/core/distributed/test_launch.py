"""Which of the processes that failed tells why the job did."""

import signal

import pytest

from llmctl.core.distributed.launch import LastWords, _root_cause

KILLED = LastWords(128 + signal.SIGKILL, "", lost=False)
ENDED_BY_AGENT = LastWords(128 + signal.SIGTERM, "", lost=False)
TOLD = LastWords(6, "step 3: loss nan is not finite", lost=False)
FOLLOWED = LastWords(1, "rank 1 lost contact with another rank", lost=True)
STOPPED = LastWords(128 + signal.SIGTERM, "stopped at step 3, which is saved", lost=False)


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        ([ENDED_BY_AGENT, KILLED], 1),  # the agent ended rank 0 when it saw that rank 1 was gone
        ([ENDED_BY_AGENT, ENDED_BY_AGENT, KILLED], 2),
        ([KILLED, ENDED_BY_AGENT], 0),
        ([ENDED_BY_AGENT, TOLD], 1),
        ([KILLED, TOLD], 1),  # a reason beats a signal
        ([FOLLOWED, KILLED], 1),
        ([FOLLOWED, ENDED_BY_AGENT], 1),  # a TERM from elsewhere to a process that had no handler yet
        ([FOLLOWED, FOLLOWED, TOLD], 2),
        ([STOPPED, ENDED_BY_AGENT], 0),
        ([TOLD, TOLD], 0),
    ],
)
def test_the_first_cause_is_told(words: list[LastWords], rank: int) -> None:
    assert _root_cause(dict(enumerate(words))) == (rank, words[rank])
    backwards = dict(reversed(list(enumerate(words))))
    assert _root_cause(backwards) == (rank, words[rank]), "the order in which they are listed counts"
