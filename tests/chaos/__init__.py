"""Workers, brokers and stores fail on purpose; what is left is compared with a plain reference.

`python -m tests.chaos` runs every case, tests/chaos/test_chaos.py a short form of some.
"""
