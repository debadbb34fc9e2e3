"""Vendors' own files, read as rules and written as templates. One file per form.

Every form has ``parse`` (text to rows, errors with file and line), ``render`` (rows to text, so
that ``parse(render(rows)) == rows``), ``read`` (rows to rules for a model) and, where the vendor's
tool writes such a file for editing, ``template``. A file that says of a layer what it has anyway
gives no rule for it, so a template that nobody edited changes nothing.

``forms``          the forms by name, and how a file's form is recognised.
``reading``        what a file comes to, the choices before it, and its errors.
``icraft``         mix-precision csv in its three column layouts.
``icraft_saturation``  ftmps and raws csv: fixed saturation points of activations and weights.
``knight``         mix-quantization JSON.
``knight_rules``   which layers of a Knight file must have equal bits.
``slimai``         ``nodename_datatypes`` and ``nodekind_datatypes`` YAML.
``glow_profile``   SlimAI's Min/Max profile, edited by hand or in place.
``sophgo``         per-layer fields of a prototxt, and ``fpfwd_inputs`` and its like.
``prototext``      the syntax of protobuf's text format.
"""
