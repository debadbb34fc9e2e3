"""Mixed precision without a search: layers are ranked once, and the worst of them raised.

``picking``   what a picker is given and gives; shares, thresholds and layers that must agree.
``positions`` ``initial`` (nothing raised) and ``io_high`` (both ends of the model).
``recurrent`` ``lstm``: recurrent layers.
``variance``  variance of the activations within their ranges, from stored statistics.
``cosine``    cosine of every layer's output with its float self, one pass.
``end_to_end``  what each layer alone does to the model's outputs, a pass a layer.
``hawq``      curvature times weight error, by forward passes alone.
``strategies``  the pickers by name, several together, and vendors' defaults.
"""
