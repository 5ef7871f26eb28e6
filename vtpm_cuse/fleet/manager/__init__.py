"""The manager's process: all TPMs of one catalogue, who asks for them, and who serves them."""
