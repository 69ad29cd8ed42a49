"""The version of the package, where modules below the functional API can import it."""

__version__ = "0.1.0"
