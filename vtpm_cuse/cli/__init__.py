"""Programs: one module each, one option table, one way to report errors."""
