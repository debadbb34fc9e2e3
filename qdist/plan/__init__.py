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
``tensor_rules``  those of a model's tensors, also by what their values were moved from.
``idle_rules``  rules without effect, which are mistakes.
``range_rule``  how one range comes about: found, scaled or given.
``consumers``  the layers that read a tensor, for the threshold method ``auto``.
``element``    the element types of the tensors that are quantized.
``activation_range``  ranges of activations, from their statistics and the rules.
``ranges``     quantizers of activations that are no plain integers per tensor.
``activation_quantizers``  the quantizer of each activation, found once.
``weight_range``  symmetric ranges of weights, per tensor, channel, group or block.
``weight_quantizers``  the quantizer of each weight, found once.
``quantizer``  the numbers of one quantized tensor.
``plan``       the whole decision for a model, as versioned JSON, with provenance.
``difference``  what differs between two plans.
``fusion``     layers that a chip computes together with the one before.
``scope``      which layers are quantized at all.
``notes``      where a plan does otherwise than was asked, and what ``auto`` chose.
``smoothing``  SmoothQuant's factors, from stored statistics.
``plan_settings``  what holds for a whole plan.
``planner``    statistics and choices in, plan out.
``target``     what a chip's numbers look like; the one place where numbers are snapped.
"""
