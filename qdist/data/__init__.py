"""Calibration and evaluation samples.

``source``       the protocol of a data set, which the next four follow.
``arrays``       NumPy files; ``images`` image files; ``text`` a text as chunks of tokens;
``function``     a user's own Python function.
``tokenizer``    from text to token ids; ``image_list`` lists and labels of images.
``numpy_file``   the arrays in a NumPy file; ``stored`` text and bytes; ``label`` labels.
``preprocess``   what turns stored values into model inputs.
``manifest``     samples named by content, in append-only generations.
``shards``       micro-batches on the manifest's grid, and shards of whole micro-batches.
``checks``       does a sample fit the model? With the error that says why not.
"""
