"""Coverage-guided fuzzing of model files with atheris, where it is installed (pip install atheris; it has wheels for some Pythons).

    python -m tests.fuzz.guided FILE [-max_total_time=60] [further flags of libFuzzer]

FILE is one of config.json, generation_config.json, model.safetensors.index.json, tokenizer.json, tokenizer_config.json,
byte-level.gguf and sentencepiece.gguf. An input that ends in anything but a model or exit code 4 is written to a file crash-*,
and `open_with(FILE, Path("crash-...").read_bytes())` of targets.py shows it again.
"""

import sys
from pathlib import Path


def main() -> None:
    """Fuzz until libFuzzer's flags say that it is enough."""
    import atheris

    with atheris.instrument_imports(include=["llmctl"]):
        from tests.fuzz.targets import FILES, GGUFS, content, open_with, sound

    if len(sys.argv) < 2 or sys.argv[1] not in FILES + GGUFS:
        sys.exit(__doc__)
    name = sys.argv.pop(1)
    corpus = Path(sound()) / "corpus"
    corpus.mkdir()
    (corpus / "sound").write_bytes(content(name))
    atheris.Setup([*sys.argv, str(corpus), f"-max_len={2 * len(content(name))}"], lambda data: open_with(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
