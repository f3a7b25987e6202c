"""Run folders written by hand, as a run would leave them."""

import json
from pathlib import Path
from typing import Any


def make_run(path: Path, *, losses: list[float | None], settings: dict[str, Any] | None = None, sample: str = "once") -> Path:
    """A run with a step for each loss, 100 tokens and half a second a step, an evaluation and a sample at the last one."""
    path.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {
            "kind": "step",
            "step": step,
            "loss": loss,
            "learning_rate": 0.1 / step,
            "grad_norm": 1.0,
            "tokens_seen": 100 * step,
            "elapsed_s": step / 2,
            "tokens_per_second": 200.0,
            "peak_share": 0.25,
        }
        for step, loss in enumerate(losses, 1)
    ]
    last = len(losses)
    lines.append({"kind": "eval", "step": last, "loss": 2.5, "bits_per_byte": 1.25})
    lines.append({"kind": "sample", "step": last, "prompt": "", "text": sample})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (settings or {}).items()))
    return path
