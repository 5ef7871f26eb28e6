"""A TPM 2.0 for each connection: handles of its own, and as much room as there is memory.

Pure: commands and responses in, commands and responses out, on any `engine.base.Tpm`. `manager`
takes a connection's command through, `objects` and `sessions` keep what it has and swap it in and
out, for what one command has `used`; `inner` makes the commands that takes. `view` is for who owns
the TPM, `saved` what a manager is between two commands.
"""
