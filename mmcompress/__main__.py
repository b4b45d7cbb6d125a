"""`python -m mmcompress` is the command `mmcompress`."""

from mmcompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
