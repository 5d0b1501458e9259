"""`python -m cwdm.cli`."""

from .main import cwdm

if __name__ == "__main__":
    cwdm()
