"""Progress bars: ours in bytes, and those of the libraries, switched off where nobody wants to see them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from tqdm import tqdm


@contextmanager
def bar(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes on stderr where the block takes longer than two seconds, unless MLflow's own are switched off.

    Yields:
        What takes the number of bytes that were done since the last call; any thread may call it.
    """
    disable = not MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get()
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, delay=2, leave=False, disable=disable) as shown:
        yield shown.update


@contextmanager
def no_bars() -> Iterator[None]:
    """No bars of transformers, of the hub's client and of MLflow's transfers, until the block ends."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hub, transfers = are_progress_bars_disabled(), MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.get_raw()
    disable_progress_bars()
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    # Not imported for this alone: it takes seconds. On its first import it follows the hub's client.
    logging = sys.modules.get("transformers.utils.logging")
    shown = not hub
    if logging is not None:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging = sys.modules.get("transformers.utils.logging")
        if logging is not None and shown:
            logging.enable_progress_bar()  # and the hub's
        (disable_progress_bars if hub else enable_progress_bars)()
        if transfers is None:
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.unset()
        else:
            MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(transfers)
