"""Scores of a model, and its layers beside those of the float model.

``report``    what an evaluation found.
``metrics``   named metrics, with and without labels.
``builtin``   runs a model over a data set and measures metrics.
``command``   the user's own script, in a folder of its own (``folder``), contained in a session of
              its own (``supervised``, ``supervisor``); ``result`` reads what it left.
``function``  the user's own Python function; ``user_code`` says where it failed.
``scorer``    any of the three, behind one function.
``reference`` the float model's outputs, on disk.
``paired``    two models' scores on the same samples: intervals of the difference.
``overlap``   are evaluation samples calibration samples?
``compare``   layer by layer, fed by float inputs and by the quantized model's own.
``sensitivity`` all layers alone, for many choices in few runs.
``end_to_end`` how far the outputs move when one group of layers is quantized.
``modes``     layer by layer, the artifact and the chip's whole numbers.
``dump``      outputs as text files, for tools that read them; ``blob`` one tensor as such.
"""
