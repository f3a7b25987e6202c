"""`python -m llmctl` (and so `torchrun -m llmctl`) runs the command line."""

from llmctl.cli.main import main

if __name__ == "__main__":
    main()
