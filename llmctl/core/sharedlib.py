"""The C++ library that is built with the package (hatch_build.py), and whether it is there. Knows ctypes; knows no part of it.

Several rooms use a part each: native/ its executor, tokenizer/ its words and merges, model/ its attention for training.
"""

import ctypes
from pathlib import Path

PATH = Path(__file__).parent / "native" / "_native.so"

ABI = 5
"""Raised with every change to a struct, a packed layout or a function; native.h has the same number."""
_ABI_UNIT = 1_000_000_000


class Unavailable(Exception):
    """The library cannot be used here; the text says why."""


def open_library() -> ctypes.CDLL:
    """The library, of this version's interface; `llmctl_abi` is declared. Raises Unavailable that says why there is none."""
    if not PATH.is_file():
        raise Unavailable("the native library was not built (it needs a C++ compiler when llmctl is installed)")
    try:
        library = ctypes.CDLL(str(PATH))
        library.llmctl_abi.restype, library.llmctl_abi.argtypes = ctypes.c_int64, []
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the native library cannot be loaded: {error}") from error
    if library.llmctl_abi() // _ABI_UNIT != ABI:
        raise other_version()
    return library


def other_version() -> Unavailable:
    """For a library whose interface is not the one that is expected."""
    return Unavailable("the native library belongs to another version of llmctl; install llmctl again")
