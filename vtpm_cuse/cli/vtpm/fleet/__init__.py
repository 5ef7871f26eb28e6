"""The commands of ``vtpm`` that ask the manager of many TPMs, a module each, and what they share."""
