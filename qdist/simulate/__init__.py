"""The quantized graph that is scored, which is the very graph that ships.

``nodes``     what stores one tensor: Q/DQ pairs, scales per token, roundings.
``pairs``     those nodes and the stored weights, made once for each quantizer.
``assemble``  a frozen graph and a projected plan in, the quantized graph out.
``integers``  the graph in the chip's whole numbers (target-exact), from ``wires``.
``layer_facts`` shapes and constants of a layer, and why it is not computed in whole numbers.
``cut_numbers`` weights and biases where ratios, as Icraft normalizes, go into them.
``ratios``    where the scales of an activation that has several lie in what is computed with it.
``tables``    functions of one tensor as tables with interpolation.
``rows``      Softmax and LayerNormalization from such tables.
``reference`` one layer in whole numbers, in NumPy: what ``integers`` is checked against.
``twins``     every quantized layer beside its float self, fed by float activations.
``switched``  a graph in which every layer can be quantized or not, by a switch.
``twin_sums`` twins of several plans at once, of which only sums leave the graph.
"""
