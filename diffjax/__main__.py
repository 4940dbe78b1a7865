"""`python -m diffjax` is the command `diffjax`."""

from diffjax.cli.main import run

if __name__ == "__main__":
    run()
