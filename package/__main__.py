"""`python -m relay_attention` is the command `relay-attention`."""

import sys

from relay_attention.cli import main

sys.exit(main())
