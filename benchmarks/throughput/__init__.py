"""The watch worker beside what users would pick instead: one broker, one log, one process each."""
