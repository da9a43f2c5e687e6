"""`python -m raycompress`."""

from raycompress.cli import main

if __name__ == "__main__":
    main()
