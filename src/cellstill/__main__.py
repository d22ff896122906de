from __future__ import annotations

from cellstill.cli import main

if __name__ == "__main__":
    main()
