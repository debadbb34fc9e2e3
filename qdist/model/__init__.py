"""The float model: reading it, freezing it, and knowing its parts.

``loading``   reads an ONNX file whose weights may be external and larger than memory.
``weights``   gives one weight at a time as an array, mapped from its file.
``opset``     raises the opset of a graph.
``freeze``    the one simplification that everything after it shares; its digest is identity.
``rewrite``   the single rewriting steps that freezing is made of.
``constants`` those of them that compute constants ahead of time.
``graph``     who makes a tensor, who reads it, of what type and shape it is.
``layers``    what a layer is: its activations, weights and outputs.
``taps``      which tensors are measured, and which merely alias another.
``session``   ONNX Runtime sessions with the settings the project's laws ask for.
"""
