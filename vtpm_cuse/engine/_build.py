"""Generates `vtpm_cuse.engine._libtpms`: cffi in out-of-line ABI mode, so no compiler is needed."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.set_source("vtpm_cuse.engine._libtpms", None)
ffibuilder.cdef((Path(__file__).parent / "decl" / "libtpms.h").read_text(encoding="ascii"))

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(Path(__file__).parents[2]))
