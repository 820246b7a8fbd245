"""``python -m kernel_lab.ptx``."""

import sys

from kernel_lab.ptx.command import main

if __name__ == "__main__":  # which it is not in the processes that main starts
    sys.exit(main())
