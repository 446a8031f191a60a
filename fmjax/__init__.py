"""fmjax: objective x model x adaptation x mesh, each a plain function or a Linen module."""

__version__ = "0.1.0"
