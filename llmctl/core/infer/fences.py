"""The code in an answer: what stands between Markdown's fences. Knows text only."""

import re

_OPENING = re.compile(r" {0,3}(?P<fence>`{3,}(?=[^`]*$)|~{3,})")


def fenced_code(text: str) -> str | None:
    """The contents of the fenced blocks of `text`, one after the other, each line ended; None when there is no block.

    Fences are CommonMark's (section 4.5): three or more backticks or tildes, closed by at least as many or by the end.
    """
    blocks: list[list[str]] = []
    fence = ""
    for line in text.split("\n"):
        bare = line.strip(" \t\r")
        if fence:
            if len(bare) >= len(fence) and set(bare) == {fence[0]} and len(line) - len(line.lstrip(" ")) < 4:
                fence = ""
            else:
                blocks[-1].append(line)
        elif found := _OPENING.match(line.rstrip("\r")):
            fence = found["fence"]
            blocks.append([])
    if not blocks:
        return None
    if fence and blocks[-1] and blocks[-1][-1] == "":  # what follows the last newline of the text is no line
        blocks[-1].pop()
    return "".join(line + "\n" for block in blocks for line in block)
