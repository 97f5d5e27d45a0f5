"""Half a surrogate pair: what JSON can spell, and no UTF-8 and so no text of a model can have."""


def half(text: str) -> int | None:
    """The place of the first one in a text; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
