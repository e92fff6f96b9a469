"""``python -m mlpint`` is the ``mlpint`` command."""

import sys

from .cli import main

sys.exit(main())
