"""What acts: Faust apps, clients of Triton and Cassandra, the local stack, the page and the command line."""
