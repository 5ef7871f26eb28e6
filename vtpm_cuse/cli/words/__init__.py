"""The grammar of every program: table, options, sub-options, numbers, help."""
