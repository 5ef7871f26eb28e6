"""Acquire, then serve: composes engine, store and frontend, and sees to life cycle and log."""
