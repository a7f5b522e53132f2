"""The programs that the worker is compared with, one small file each. They import nothing of the product.

Each takes the same flags (counting.py) and reads one topic. Those with state keep counts decayed at two horizons per
viewer and cluster. One that commits its position to Kafka is watched there; another prints how many events it handled.
"""
