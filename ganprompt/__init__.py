__version__ = "0.1.0"


def __getattr__(name):
    "`from ganprompt import Run` also loads the chapters that add readers to it."
    if name != "Run": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import attributes, data, encoder, figures, metrics, prompts, recommender  # noqa: F401
    from .runs import Run
    return Run
