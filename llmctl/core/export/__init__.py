"""Models into other formats, each read back and compared. Knows checkpoints; knows no training and no command."""
