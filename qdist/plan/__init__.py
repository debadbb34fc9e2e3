"""Deciding how each layer is quantized, and with which numbers.

``precision``  the named precisions a layer can have.
``granularity``  what shares a scale.
``choice``     what is chosen for one layer.
``rules``      choices by name, pattern or operator type.
``consumers``  the layers that read a tensor, for the threshold method ``auto``.
``weight_range``  symmetric ranges of weights, per tensor, channel, group or block.
``ranges``     quantizers of activations that are no plain integers per tensor.
``quantizer``  the numbers of one quantized tensor.
``plan``       the whole decision for a model, as versioned JSON.
``fusion``     layers that a chip computes together with the one before.
``scope``      which layers are quantized at all.
``planner``    statistics and choices in, plan out.
``target``     what a chip's numbers look like; the one place where numbers are snapped.
"""
