"""trio: what connects a vTPM with the device or the sockets that it is served on."""
