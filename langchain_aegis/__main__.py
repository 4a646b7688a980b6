"""`python -m langchain_aegis` is the command `aegis`."""

from langchain_aegis.cli import main

if __name__ == "__main__":
    main()
