"""The vTPM: engine, store, lifecycle and locality; PTM requests; what an open of a device sees."""
