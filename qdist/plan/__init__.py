"""Deciding how each layer is quantized, and with which numbers.

``precision``  the named precisions a layer can have.
``granularity``  what shares a scale.
``choice``     what is chosen for one layer.
``dtype_name``  the number formats that rules and vendors' files can name.
``layer_index``  a model's layers in order, with their neighbours and blocks.
``selector``   which layers or tensors a rule is about.
``tensor_settings``  what rules say about one tensor.
``rules``      choices for layers and settings for tensors, in order.
``dialects``   vendors' files, read as rules and written as templates.
``range_rule``  how one range comes about: found, scaled or given.
``consumers``  the layers that read a tensor, for the threshold method ``auto``.
``weight_range``  symmetric ranges of weights, per tensor, channel, group or block.
``ranges``     quantizers of activations that are no plain integers per tensor.
``quantizer``  the numbers of one quantized tensor.
``plan``       the whole decision for a model, as versioned JSON, with provenance.
``difference``  what differs between two plans.
``fusion``     layers that a chip computes together with the one before.
``scope``      which layers are quantized at all.
``planner``    statistics and choices in, plan out.
``target``     what a chip's numbers look like; the one place where numbers are snapped.
"""
