"""`python -m llmctl` (and so `torchrun -m llmctl`) and the `llmctl` script run the command line."""

import signal


def main() -> None:
    """Run the command line; an interrupt while its modules are loaded ends the process without a traceback."""
    try:
        from llmctl.cli.main import main as run
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    run()


if __name__ == "__main__":
    main()
