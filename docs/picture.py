"""Draws docs/images/terminal.svg: a terminal in which the built-in model tells a story. Run it again after a new model.

python docs/picture.py
"""

import io
import subprocess
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ("generate", "Once upon a time", "--echo", "--seed", "1", "-n", "150")
SHOWN = 'llmctl generate "Once upon a time" --echo --seed 1 -n 150'
WIDTH = 92


def main() -> None:
    """Run the command and write the picture."""
    story = subprocess.run([sys.executable, "-m", "llmctl", *COMMAND], check=True, capture_output=True, text=True).stdout
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text("$ ", style="bold green") + Text(SHOWN))
    for paragraph in story.rstrip("\n").split("\n"):
        console.print(Text("\n".join(textwrap.wrap(paragraph, WIDTH)) or ""))
    console.print(Text("$ ", style="bold green") + Text("▌"))
    target = Path(__file__).parent / "images" / "terminal.svg"
    target.parent.mkdir(exist_ok=True)
    target.write_text(console.export_svg(title="llmctl"), encoding="utf-8")


if __name__ == "__main__":
    main()
