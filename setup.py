"""Everything is in setup.cfg but the one keyword that only a call can give."""

from setuptools import setup

setup(cffi_modules=["vtpm_cuse/engine/_build.py:ffibuilder"])
