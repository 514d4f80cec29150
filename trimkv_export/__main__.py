"""`python -m trimkv_export`."""

from trimkv_export.cli import main

if __name__ == "__main__":
    main()
