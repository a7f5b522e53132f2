"""The local stack: Apache Kafka, Apache Cassandra and Triton on this machine, without containers or a Java install."""


class LocalStackError(Exception):
    """Whatever keeps the local stack from starting or stopping; the message says what to do."""
