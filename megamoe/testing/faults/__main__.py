import contextlib
import sys

from megamoe.testing.faults.table import main

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
