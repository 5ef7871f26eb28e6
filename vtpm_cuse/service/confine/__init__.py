"""Least privilege: user, root, capabilities, paths, system calls."""
