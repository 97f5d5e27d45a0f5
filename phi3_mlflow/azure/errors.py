"""What went wrong on the way to Azure, told in one line that holds no secret.

It knows the exceptions of the Azure packages by their attributes only, and imports none of them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from phi3_mlflow.runtime.errors import Phi3Error

INSTALL = 'pip install "phi3-mlflow[azure]"'
_SECRETS = (
    re.compile(r"(?i)(?<=\bsig=)[^&\s'\"<>)]+"),
    re.compile(r"(?i)(?<=AccountKey=)[^;\s'\"]+"),
    re.compile(r"(?i)(?<=Bearer )[\w.~+/=-]+"),
    re.compile(r"(?i)(?<=client_secret=)[^&\s'\"]+"),
)
_ADVICE = {
    401: "the credential was refused: run `az login`, or check AZURE_CLIENT_ID, AZURE_TENANT_ID, AZURE_CLIENT_SECRET",
    403: "the identity lacks a role: ask for AzureML Data Scientist on the workspace and Storage Blob Data Contributor "
    "where its datastore uses identities",
    404: "check the names, and that the workspace is the right one",
    409: "something else changes the same resource: wait until it is done and run the command again",
    412: "something else changes the same resource: wait until it is done and run the command again",
    429: "Azure throttles: wait some minutes and run the command again",
}


class AzureError(Phi3Error):
    """A step towards Azure ML that failed or was refused, told in one line."""


class SettingError(AzureError):
    """A value that Azure would refuse, refused before any call."""


def redact(text: str) -> str:
    """The text with shared access signatures, account keys, bearer tokens and client secrets blotted out."""
    for pattern in _SECRETS:
        text = pattern.sub("[redacted]", text)
    return text


@contextmanager
def explained(doing: str, where: str = "") -> Iterator[None]:
    """Turns what the Azure packages raise inside the block into one `AzureError` line.

    Args:
        doing: what is being done, for example "reading model phi3:2".
        where: which workspace is used and where its name came from; put at the end of the line.

    Raises:
        AzureError: for every exception of azure-core, azure-identity and azure-ai-ml, without its chain, because
            messages down the chain carry URLs with signatures in them.
    """
    try:
        yield
    except Phi3Error:
        raise
    except Exception as error:
        if not _is_azure(error):
            raise
        message = explain(error, doing, where)
    else:
        return
    told = AzureError(message)
    try:
        raise told
    finally:
        told.__context__ = None


def explain(error: BaseException, doing: str, where: str = "") -> str:
    """One line for an exception of the Azure packages: what was being done, Azure's own words, what to do next."""
    status = getattr(error, "status_code", None)
    code = getattr(getattr(error, "error", None), "code", None) or getattr(error, "error_code", None)
    kind = type(error).__name__
    if kind in ("CredentialUnavailableError", "ClientAuthenticationError") and status is None:
        head = f"no credential for Azure while {doing}"
        advice = (
            "run `az login`, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET "
            "(DefaultAzureCredential tries them in turn)"
        )
    elif kind.startswith(("ServiceRequest", "ServiceResponse", "IncompleteRead")):
        head = f"the connection to Azure failed while {doing}: {_first_line(str(error))}"
        advice = "check the network and run the command again"
    else:
        # A long-running operation tells its failure in an answer of status 200.
        parts = [f"HTTP {status}" if status and status >= 400 else "", str(getattr(code, "value", code) or "")]
        answer = " ".join(part for part in parts if part) or kind
        head = f"Azure refused {doing} ({answer}): {_first_line(getattr(error, 'message', None) or str(error))}"
        advice = _ADVICE.get(status or 0, "")
    return redact("; ".join(part for part in (head.rstrip(". "), advice, where) if part))


def _is_azure(error: BaseException) -> bool:
    return any(
        parent.__module__.split(".")[0] in ("azure", "msrest", "msal") for parent in type(error).__mro__
    ) or isinstance(error, ConnectionError)


def _first_line(text: str, limit: int = 300) -> str:
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith(("Content:", "Code:"))), "no reason given")
    line = re.sub(r"^\(\w+\) ", "", line)
    return line if len(line) <= limit else line[:limit] + "..."
