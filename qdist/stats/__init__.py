"""Statistics that merge exactly.

``grid``       how float32 values map to bins: the top 16 bits.
``kernels``    the counting and merging loops, compiled with Numba.
``histogram``  the counts of one tensor, and what can be read off them.
``record``     histograms of many tensors, as one mergeable value.
``observer``   runs the tapped model over one shard and returns its record.
"""
