"""What ships.

``writer``  writes a quantized graph to disk, one weight at a time.
``qdq``     the QDQ ONNX artifact: assembled, written, checked, loaded.
``deployment``  where a deployed ONNX Runtime would not compute what was scored.
"""
