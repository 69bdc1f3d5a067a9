#!/usr/bin/env python
"""Names regions of photos and videos. README.md in this folder has examples."""

import sys

if __name__ == "__main__":
    try:
        from regionspot_d2.app.main import main
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is missing: pip install regionspot_d2[demo]")
    except KeyboardInterrupt:
        print("Stopped before the first image; nothing was done.", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
