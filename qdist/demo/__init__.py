"""The demo input that ships with the project: two trained models and real handwritten digits.

The images are scikit-learn's digits: 1,797 scans of 8x8 pixels with values 0..16, which are the
test set of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998,
CC BY 4.0). A fixed split, stratified by class, gives 1,037 images for training, 160 for
calibration and 600 for testing. The files are:

* ``digits.npz``: ``calibration_images``, ``calibration_labels``, ``test_images`` and
  ``test_labels``; images are uint8 ``[n, 1, 8, 8]`` with values 0..16, labels are int64. The
  training images are left out, as nothing here needs them.
* ``digits_vit.onnx``: a vision transformer (opset 17; 16 patch tokens and a class token, width
  64, depth 4, 4 heads; 136,074 parameters). Float accuracy on the test images: 98.50 %
  (591 of 600).
* ``digits_cnn.onnx``: a convolutional network (opset 13; a residual and a depthwise-separable
  block; 59,082 parameters, batch normalisation already folded). Float accuracy on the test
  images: 99.83 % (599 of 600).

Both models take ``images``, float32 ``[batch, 1, 8, 8]`` holding ``(pixel / 16 - 0.3) / 0.37``,
and return ``logits``, ``[batch, 10]``. The accuracies are ONNX Runtime's on the CPU.
``scripts/train_digits.py`` makes all three files.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
_SUFFIXES = (".npz", ".onnx")


def demo_file(name: str) -> Path:
    """The absolute path of a shipped file, e.g. ``demo_file("digits_vit.onnx")``.

    Raises:
        ValueError: no such file is shipped; the message lists those that are.
    """
    shipped = sorted(path.name for path in _FOLDER.iterdir() if path.suffix in _SUFFIXES)
    if name not in shipped:
        raise ValueError(f"no demo file {name!r}; there are: {', '.join(shipped) or 'none'}")
    return _FOLDER / name
