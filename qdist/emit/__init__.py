"""What ships.

``writer``  writes a quantized graph to disk, one weight at a time.
``qdq``     the QDQ ONNX artifact: assembled, written, checked, loaded.
"""
