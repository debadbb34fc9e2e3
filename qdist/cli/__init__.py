"""The command line: the edge where Hydra, Ray and MLflow meet the library.

``main``      finds the command, runs it, turns errors into one line and exit status 2.
``help``      what ``--help`` prints; ``keys`` every key with its default.
``schema``    what a configuration may hold; everything else is refused. ``data_schema`` its data.
``groups``    where the configuration groups are, and which choices each has.
``compose``   Hydra's errors in our words.
``domain``    validated configuration in, frozen values of the library out; ``sizes`` bytes.
``samples``   the calibration samples as asked for; ``selecting`` the representative ones of them.
``context``   what every command starts with: console, settings, model, tracker.
``progress``  live bars on a terminal, plain lines elsewhere.
``tracking``  MLflow.
``commands``  one module a command.
"""
