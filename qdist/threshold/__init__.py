"""Clipping ranges from histograms. No method runs the float model.

``clip``        a range, and what it costs.
``error``       expected squared error of a uniform quantizer on a density.
``maximum``, ``percentile``, ``mse``, ``entropy``  one family each; so are
``aciq``, ``admm``, ``improved``.
``consumer``    what a layer makes of an error in the tensor that it reads.
``root``        what a square root makes of one.
``auto``        the method with the least expected error in the layers that read a tensor.
``float_error`` ranges for floating-point types of 8 bits, by the error on their grid.
``pinning``     how far stored bins pin a range down that is found on linear bins.
``adjust``      a range scaled (``th_scale``) or given (``threshold``).
``sentinel``    values that mean "masked" rather than a magnitude.
``registry``    the methods by name, vendors' names for them, and the functions that apply them.
``sources``     densities of channels, groups and weights.
``kernels``, ``mse_kernels``, ``divergence_kernels``, ``joint_kernels``  the loops, compiled.
``warm``        compiles them ahead of the first run.
``blocks``      the mean of the ranges of equal blocks (Icraft's ``batch``).
``bootstrap``   how well the samples pin a range down, and how many more would.
``convergence`` have ranges stopped moving? The policy of early stopping.
"""
