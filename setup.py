"""Everything is in setup.cfg but the binding to libtpms and the programs, which only a call can make."""

from pathlib import Path
from typing import Final

from setuptools import setup

from distutils.command.build_scripts import build_scripts  # isort: skip  setuptools brings it

# An installer would start Python without -I, and then what the caller's environment says of Python
# (PYTHONHOME, PYTHONPATH) counts before any code of ours runs. So the file is a shell script first,
# about a millisecond long, and the same file to Python, whose string ends where the shell has gone.
# What is unset Python would hear in spite of -I, and take itself for the one of another folder.
# What the shell runs is the system's (command -p), whatever the caller's PATH says.
PROGRAM: Final = """\
#!/bin/sh
''':'
folder=${{0%/*}}
[ -e "$folder/{marker}" ] || folder=$(command -p dirname "$(command -p readlink -f "$0")")
IFS= read -r python <"$folder/{marker}" || exit 127
case $python in */sh) python="#!$folder/python3" ;; esac # some installers' way around a long path
alone=-I
[ "$folder" != "$HOME/.local/bin" ] || alone=-EP # where a user's own packages are, it is one of them
unset PYTHONEXECUTABLE __PYVENV_LAUNCHER__
exec "${{python#??}}" $alone "$0" "$@"
'''
import _signal
import sys

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # which shows no traceback of an import

try:  # the name that ps shows: as if the kernel had started this file
    with open("/proc/self/comm", "w") as name:
        name.write("{name}")
except OSError:
    pass

room = b""
try:
    room = bytes(1 << 21)  # for the words about a lack of memory; nothing touches it
    from {module} import {function}
except (MemoryError, SystemError):  # the latter is for a module in C that had none and did not say
    del room
    sys.exit("{name}: There is too little memory; raise the limit: 'ulimit -v'")
except (ImportError, OSError) as exc:
    del room
    sys.exit(f"{name}: A part of this program cannot be loaded: {{exc}}")
del room

sys.exit({function}())
"""
MARKER: Final = "deploy/vtpm-cuse-python"


class Programs(build_scripts):
    """Makes the programs that setup.cfg lists."""

    def run(self) -> None:
        """Beside the marker."""
        super().run()
        for entry in self.distribution.entry_points["vtpm_cuse.programs"]:
            name, module, function = entry.replace("=", " ").replace(":", " ").split()
            program = Path(self.build_dir, name)
            marker = Path(MARKER).name
            program.write_text(
                PROGRAM.format(name=name, module=module, function=function, marker=marker)
            )
            program.chmod(0o755)


setup(
    cffi_modules=["vtpm_cuse/engine/_build.py:ffibuilder"],
    scripts=[MARKER],
    cmdclass={"build_scripts": Programs},
)
