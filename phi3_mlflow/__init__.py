"""Microsoft's Phi-3 as governed, fast, well-behaved MLflow models."""

from pkgutil import extend_path

# A logged model carries a copy of this package that holds only `runtime`. Extending the path lets a process
# that imported that copy first still find the installed toolkit's other modules.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
