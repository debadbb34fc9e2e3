"""Where the records of a calibration are kept, each written once or not at all.

``identity``    what makes two calibrations the same one.
``receipt``     what a finished shard leaves behind.
``protocol``    what any store must do.
``zarr_store``  the implementation on Zarr v3.
``coverage``    which micro-batches finished shards already answer for.
"""
