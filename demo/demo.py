#!/usr/bin/env python
"""Names regions of photos and videos. README.md beside this file has examples."""

import sys

from regionspot_d2.app.main import main

if __name__ == "__main__":
    sys.exit(main())
