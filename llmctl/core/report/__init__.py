"""Reports on runs: run folders in, one self-contained HTML page out. Knows the files of a run; knows no model and no torch."""
