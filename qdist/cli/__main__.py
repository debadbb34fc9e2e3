"""``python -m qdist.cli`` is ``qdist``."""

import sys

from qdist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
