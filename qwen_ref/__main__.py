"""`python -m qwen_ref` is `qwen-ref`."""

import sys

from .cli import main

sys.exit(main())
