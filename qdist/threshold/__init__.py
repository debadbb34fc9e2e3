"""Clipping ranges from histograms. No method runs the float model.

``clip``        a range, and what it costs.
``error``       expected squared error of a uniform quantizer on a density.
``maximum``, ``percentile``, ``mse``, ``entropy``  one family each.
``sentinel``    values that mean "masked" rather than a magnitude.
``registry``    the methods by name, and the one function that applies them.
"""
