"""What was measured, where something that comes after failed: its numbers are not to be lost."""

from typing import Any

from phi3_mlflow.runtime.errors import Phi3Error


class Unfinished(Phi3Error):
    """A measurement that was made and could not be kept as asked.

    Args:
        problem: what failed, without the reason.
        error: the reason.
        result: what would have been returned; a gate in it has not passed.
    """

    def __init__(self, problem: str, error: Exception, result: dict[str, Any]):
        super().__init__(problem + (str(error) or type(error).__name__).splitlines()[0])
        self.result = result
        if "gate" in result:
            result["gate"]["passed"] = False
