"""Builds the native library when the package is built or installed, if there is a C++ compiler. Run by hatchling.

Without a compiler, or when compiling fails, the package is built without the library and torch computes instead. A wheel
with the library is of this platform only, for any Python 3, since it is called through ctypes; without it, it is for all.

    CXX=clang++ pip install .        another compiler ("" or a name that does not exist: none)
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run as a script
    BuildHookInterface = object

NATIVE = Path("llmctl/core/native")
LIBRARY = NATIVE / "_native.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
SOURCES: dict[str, tuple[str, ...]] = {
    "native.cpp": (),
    "bpe.cpp": (),
    "words.cpp": (),
    "causal.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "isa_baseline.cpp": (),
    "isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "isa_avxvnni.cpp": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    "isa_avx512.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"),
}
"""Each source with the flags of its instruction set, which only x86-64 compilers know."""
OPTIONAL_FLAG = "-mavxvnni"
"""GCC 11 and clang 12 know it; for older ones the source that has it is compiled without."""


class CustomBuildHook(BuildHookInterface):
    """Compiles before the wheel, or the editable install, is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling."""
        root = Path(self.root)
        compiler = find_compiler()
        try:
            (root / LIBRARY).unlink(missing_ok=True)  # never an old library with new sources
            if compiler is None:
                self.app.display_warning("no C++ compiler found: built without the native library, torch will compute")
                return
            compile_library(compiler, root)
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"the native library was not built, torch will compute: {detail.strip()[-2000:]}")
            return
        build_data["artifacts"].append(f"/{LIBRARY.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag()}"


def platform_tag() -> str:
    """The wheel's platform, such as linux_x86_64. A universal Python on macOS compiles for the machine that it runs on."""
    name = sysconfig.get_platform()
    if name.startswith("macosx-"):
        name = "-".join([*name.split("-")[:2], platform.machine()])
    return name.replace("-", "_").replace(".", "_")


def find_compiler() -> list[str] | None:
    """$CXX if it is set, else the first of the usual names that is there."""
    if "CXX" in os.environ:
        words = shlex.split(os.environ["CXX"])
        return words if words and shutil.which(words[0]) else None
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    return None


def compile_library(compiler: list[str], root: Path) -> None:
    """Compile and link, then put the library in its place. Raises OSError or SubprocessError."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(source: str) -> str:
            target = str(Path(folder) / f"{source}.o")
            flags = SOURCES[source] if is_x86 else ()
            arguments = ["-c", str(root / NATIVE / source), "-o", target]
            try:
                run([*compiler, *FLAGS, *flags, *arguments])
            except subprocess.CalledProcessError:
                if OPTIONAL_FLAG not in flags:
                    raise
                run([*compiler, *FLAGS, *(flag for flag in flags if flag != OPTIONAL_FLAG), *arguments])
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        built = Path(folder) / LIBRARY.name
        run([*compiler, "-shared", *objects, "-pthread", "-o", str(built)])
        fresh = root / LIBRARY.with_suffix(".new")
        shutil.copy(built, fresh)
        os.replace(fresh, root / LIBRARY)  # a program that has the old one open keeps it


def run(command: list[str]) -> None:
    """Run a command. Raises SubprocessError with its stderr, also when it takes more than ten minutes."""
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


if __name__ == "__main__":  # python hatch_build.py: the library alone, for work on it
    found_compiler = find_compiler()
    if found_compiler is None:
        sys.exit("no C++ compiler found")
    compile_library(found_compiler, Path(__file__).parent)
