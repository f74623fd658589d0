"""`python -m ds_vshape`: the same as the command `ds-vshape`."""

import sys

from ds_vshape.cli import main

sys.exit(main())
