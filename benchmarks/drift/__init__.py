"""When to refresh a persona: the product's rule against every common one, on simulated viewers with known tastes.

Run as `python -m benchmarks.drift`; see RESULTS.md for the committed run.
"""
