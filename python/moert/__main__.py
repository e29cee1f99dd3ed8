"""python -m moert: the moert command."""

from moert.cli import main

if __name__ == "__main__":
    main()
