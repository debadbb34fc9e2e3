"""Where the records of a calibration are kept, each written once or not at all.

``identity``    what makes two calibrations the same one.
``receipt``     what a finished shard leaves behind.
``coverage``    which parts of stored records answer for micro-batches and tensors.
``gathering``   one record of all those parts.
``protocol``    what any store must do.
``zarr_store``  the store: ``create_store``, ``open_store``.
``layout``      the objects that it consists of, schema 2.
``container``   a Zarr v3 group in one object.
``chunks``      its arrays straight from their chunks, as Zarr would read them.
``records``     records as containers under names that say what is in them.
``merges``      finished merges, and which is the latest.
``nodes``       merges of some records only: the inner nodes of a merge of many.
``sweep``       removing what nothing refers to any more.
``portable``    a finished calibration in one file.
``location``    folder or URL; ``place`` what both have in common, ``local`` and ``remote`` each.
``sketches``    a folder of sketches, from which samples are selected.
``sensitivities`` how far layers move when they are quantized.
``failures``    the errors of a store.
"""
