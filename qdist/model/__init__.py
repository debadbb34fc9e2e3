"""The float model: reading it, freezing it, and knowing its parts.

``loading``   reads an ONNX file whose weights may be external and larger than memory.
``weights``   gives one weight at a time as an array, mapped from its file.
``opset``     raises the opset of a graph.
``freeze``    the one simplification that everything after it shares; its digest is identity.
``rewrite``   the single rewriting steps that freezing is made of.
``constants`` those of them that compute constants ahead of time.
``difference`` does a rewritten model still compute what it did?
``graph``     who makes a tensor, who reads it, of what type and shape it is.
``layers``    what a layer is: its activations, weights and outputs.
``adjacency`` which layers feed which; ``blocks`` residual blocks; ``groups`` what must agree.
``session``   ONNX Runtime sessions with the settings the project's laws ask for.

Channels of even ranges (SmoothQuant):

``smooth_points`` tensors whose channels can be scaled without a change of the outputs.
``smoothing``  by how much; ``smoothed`` the model with these factors in its constants.

What is measured:

``taps``      which tensors are measured, and which merely alias another.
``views``     operators that only rearrange values; ``origins`` where a tensor's values come from.
``bodies``    the tensors inside ``If``, ``Loop`` and ``Scan``; ``hoist`` brings them out.
``elements``  element types of every tensor; ``precision`` where float16 and bfloat16 are spoken of.
``half``      half precision, computed in float32 and rounded where the model says.
``stretches`` runs a graph a few measured tensors at a time.
``channels``  which axis counts a tensor's channels.
``masks``     tensors that carry a mask into a Softmax.
``experts``   layers that see only the tokens that a router sends them.

Models larger than memory:

``flow``      the work of a graph as steps, and what crosses between them.
``shapes``    how large every tensor is for given inputs.
``estimate``  how much memory consecutive steps take; ``cutting`` where to cut.
``parts``     consecutive steps as a graph of their own; ``segments`` those that fit a budget.
``relay``     what waits between segments and phases; ``spool`` in memory, and beyond that on disk.
``frugal``    sessions that hold as little memory as they can.
``within``    one run of a model within a budget.
"""
