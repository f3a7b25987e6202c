"""What speaks to people: flags, streams, exit codes, progress. The work itself is in llmctl.core."""
