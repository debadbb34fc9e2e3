"""The quantized graph that is scored, which is the very graph that ships.

``pairs``     Q/DQ nodes and integer weights for one quantizer each.
``assemble``  a frozen graph and a projected plan in, the quantized graph out.
``twins``     every quantized layer beside its float self, fed by float activations.
"""
