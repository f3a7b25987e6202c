"""The CPU executor of inference: a small C++ library behind ctypes. Knows ModelConfig and arrays; no torch, no file of weights.

The library is built when the package is (hatch_build.py). Where there is none, `library.load()` says why and torch computes.
"""
