"""Clipping ranges from histograms. No method runs the float model.

``clip``        a range, and what it costs.
``error``       expected squared error of a uniform quantizer on a density.
``maximum``, ``percentile``, ``mse``, ``entropy``  one family each.
``sentinel``    values that mean "masked" rather than a magnitude.
``registry``    the methods by name, and the one function that applies them.
``kernels``     the error integral, compiled.
``blocks``      the mean of the ranges of equal blocks (Icraft's ``batch``).
``convergence`` have ranges stopped moving? The policy of early stopping.
"""
