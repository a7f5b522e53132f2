"""How good personas are: contexts with a known truth, worded by the real writer and student, then judged.

Every judge is a small pure function over cases and what was written for them. None calls the gate that the writer asks
before it publishes (`streams.wording`), except where a figure is about that gate.
"""
