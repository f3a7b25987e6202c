"""The table of docs/models.md: what the parity tests found, the largest difference of all settings of a family in each column."""

from pathlib import Path

import torch

from llmctl.core.families import FAMILIES

COLUMNS = ("logits", "gradients", "cached", "round trip", "generate")
FOUND: dict[tuple[str, str], float] = {}
START, END = "<!-- parity: written by the tests -->", "<!-- end of parity -->"


def record(family: str, column: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Keep the largest absolute difference of a comparison."""
    difference = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    FOUND[family, column] = max(FOUND.get((family, column), 0.0), difference)


def rows(page: str) -> dict[str, list[float]]:
    """Family -> numbers of its row, of the table in the text of the page."""
    lines = page.partition(START)[2].partition(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): [float(cell) for cell in numbers] for name, *numbers in cells}


def write(page: Path) -> None:
    """Put what was found into the page. Raises LookupError when a test did not run."""
    missing = [(family, column) for family in FAMILIES for column in COLUMNS if (family, column) not in FOUND]
    if missing:
        raise LookupError(f"no test gave {missing[0][1]} of {missing[0][0]}; run all of tests/core/model/test_parity.py in one process")
    head = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines = [f"| `{family}` | " + " | ".join(f"{FOUND[family, column]:.1g}" for column in COLUMNS) + " |" for family in FAMILIES]
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + "\n".join([START, "", *head, *lines, "", END]) + rest.partition(END)[2])
