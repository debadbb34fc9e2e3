"""Calibration and evaluation samples.

``source``       the protocol of a data set, which the next six follow.
``arrays``       NumPy files; ``images`` image files; ``text`` a text as chunks of tokens;
``function``     a user's own Python function that returns samples;
``captured``     what a user's own inference function feeds to an ``executor``;
``random_source``  random numbers, from the shapes of the inputs alone.
``selection``    which samples stand for the whole set, from sketches of what they do.
``subset``       sources of some samples of another: the first, all but some, those of a list.
``sequence``     sources of another's samples with padding cut off, or padded to a few lengths.
``positions``    which elements of an activation belong to positions that are no padding.
``decoder``      models with a cache: prefill and decode steps out of samples of tokens.
``tokenizer``    from text to token ids; ``image_list`` lists and labels of images.
``numpy_file``   the arrays in a NumPy file; ``stored`` text and bytes; ``label`` labels.
``preprocess``   what turns stored values into model inputs.
``manifest``     samples named by content, in append-only generations.
``shards``       micro-batches on the manifest's grid, shards of whole micro-batches, blocks.
``checks``       does a sample fit the model? With the error that says why not.
"""
