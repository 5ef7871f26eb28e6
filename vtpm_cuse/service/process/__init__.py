"""What a service is to its system: background, pid file, signals, logs, readiness."""
