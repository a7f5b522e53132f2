"""The demo: the whole system on one machine, with viewers whose tastes are known."""
