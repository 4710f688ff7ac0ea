"""`python -m zerograph` is the command line."""

from zerograph.cli import main

if __name__ == "__main__":
    main()
