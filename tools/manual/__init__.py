"""Man pages and completions, made from the programs' tables: ``python -m tools.manual``."""
