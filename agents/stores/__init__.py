"""Where personas are kept: the port, an in-memory store with the same behaviour, and Cassandra."""
