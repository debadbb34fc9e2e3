"""What numbers a chip has: the one place that planning, simulation and emitters share.

``dtype``     integer and floating-point types by name, with their ranges.
``rounding``  rounding to integers and to floating-point types, in NumPy: what everything else in
              the project is checked against.
``grid``      which scales a chip can multiply with: any float32, powers of two, ``m * 2**-n``.
``cuts``      how an ``m * 2**-n`` scale is split over a matrix unit and a vector unit.
``table``     how long the tables of functions are.
"""
