"""``vtpm``, the program for people, with one module for each of its commands."""
