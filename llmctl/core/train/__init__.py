"""Training. Knows the decoder, data and checkpoints; knows no command."""
