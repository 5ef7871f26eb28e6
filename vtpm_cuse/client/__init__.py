"""Talking to a running vTPM, shared by tools and tests."""
