"""Regular expressions of JSON Schema (ECMA 262) as llguidance reads them, and those of formats and of finite sets.

Knows the two dialects; knows nothing of schemas.
"""

import re
from collections.abc import Iterable

MAX_PATTERN = 2_048
# A number of repetitions multiplies what is repeated; nested ones multiply each other.
MAX_REPEATED = 20_000

_SPACE = r"\t-\r \x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_ALL_SPACE = rf"{_SPACE}\x00\x1c-\x1f\x{{85}}\x{{feff}}"
_NUL = re.compile(r"\\(?:0|x00|u0000|u\{0+\}|x\{0+\})")
_LOOK = re.compile(r"\(\?<?[=!]")
_COUNT = re.compile(r"\{[0-9]+(?:,[0-9]*)?\}")
_SIGNS = frozenset("^$\\.*+?()[]{}|/-")
_DAY = (
    r"(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)  # fmt: skip
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_PCT = r"%[0-9a-fA-F]{2}"
_CHAR = rf"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|{_PCT})"
_NAME = rf"(?:[a-zA-Z0-9._~!$&'()*+,;=-]|{_PCT})"
# RFC 3986, 4.1, without addresses in brackets.
_REFERENCE = (
    rf"(?:(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?(?://(?:(?:{_NAME}|:)*@)?{_NAME}*(?::[0-9]*)?(?:/{_CHAR}*)*|/(?:{_CHAR}+(?:/{_CHAR}*)*)?)"
    rf"|[a-zA-Z][a-zA-Z0-9+.-]*:(?:{_CHAR}+(?:/{_CHAR}*)*)?|(?:{_NAME}|@)+(?:/{_CHAR}*)*|)"
    rf"(?:[?](?:{_CHAR}|[/?])*)?(?:#(?:{_CHAR}|[/?])*)?"
)
# RFC 1123, without labels that only look like letters beyond ASCII (`xn--`).
_LABEL = (
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,2}[a-zA-Z0-9])?"
    r"|[a-zA-Z0-9][a-zA-Z0-9-](?:[a-zA-Z0-9][a-zA-Z0-9-]|-[a-zA-Z0-9])[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])"
)
# Formats whose own expression here replaces llguidance's, which lets February have 29 days in every year and a minute
# 61 seconds, or that it lacks. RFC 3339, RFC 3986, RFC 6901.
FORMATS = {
    "hostname": rf"^{_LABEL}(?:\.{_LABEL})*$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uri-reference": f"^{_REFERENCE}$",
    "json-pointer": r"^(?:/(?:[^~/]|~[01])*)*$",
    "relative-json-pointer": r"^(?:0|[1-9][0-9]*)(?:#|(?:/(?:[^~/]|~[01])*)*)$",
}
# Those that llguidance's own list (parser/src/json/formats.rs) enforces as validators understand them.
MAX_HOSTNAME = 253
BUILT_IN = ("duration", "email", "ipv4", "ipv6", "uuid", "uri")


class Untranslatable(ValueError):
    """A regular expression that means something else in llguidance's dialect, or that it lacks."""


def translate(pattern: str) -> str:
    """The expression for llguidance, whose syntax is that of Rust's `regex`.

    Rust reads `[`, `&&`, `--` and `~~` within a class as set operations, where ECMA 262 reads characters. And
    llguidance lets a class of all control characters match a quote and a backslash as well (json_quote in derivre's
    regexbuilder.rs), so U+0000, which no answer can contain, is taken out of every class that could have all.

    Raises:
        Untranslatable: look-around, a reference back, word borders, a repetition without a lower bound, or one of
            more than MAX_REPEATED copies in all.
    """
    if "\0" in pattern:
        raise Untranslatable("U+0000 is not supported")
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char, following = pattern[at], pattern[at + 1 : at + 2]
        if char == "\\":
            if following in tuple("123456789"):
                raise Untranslatable("references back are not supported")
            if following in ("b", "B"):
                raise Untranslatable("word borders (`\\b`) are not supported")
            if _NUL.match(pattern, at):
                raise Untranslatable("U+0000 is not supported")
            out.append(_escaped(following))
            at += 2
            continue
        if char == "[":
            text, at = _class(pattern, at)
            out.append(text)
            continue
        if char == "(" and _LOOK.match(pattern, at):
            raise Untranslatable("look-around, including look-ahead and look-behind, is not supported")
        if char == "{" and not _COUNT.match(pattern, at):
            if following == ",":
                raise Untranslatable("a repetition needs a lower bound, as in `{0,3}`")
            char = "\\{"
        out.append(char)
        at += 1
    text = "".join(out)
    if _copies(text) > MAX_REPEATED:
        raise Untranslatable(f"its repetitions make more than {MAX_REPEATED} copies")
    return text


def _escaped(char: str, negated: bool = False) -> str:
    """An escape for Rust, within a negated class or elsewhere.

    Rust takes no escapes of signs beyond ASCII's punctuation, which ECMA 262 lets stand for themselves; and what is
    white space is what both ECMA 262 and Python's `re` call so.
    """
    if char == "c":
        raise Untranslatable("`\\c` is not supported")
    if char in ("s", "S"):
        return f"[{_ALL_SPACE if negated else _SPACE}]" if char == "s" else f"[^{_SPACE if negated else _ALL_SPACE}]"
    return "\\" + char if char.isalnum() or char in _SIGNS else re.escape(char)


def _class(pattern: str, at: int) -> tuple[str, int]:
    """The class `[...]` that begins at `at`, for Rust, and where it ends."""
    negated = pattern[at + 1 : at + 2] == "^"
    start = end = at + 1 + negated
    out = []
    while end < len(pattern) and (pattern[end] != "]" or end == start):
        char, following = pattern[end], pattern[end + 1 : end + 2]
        if char == "]":
            raise Untranslatable("an empty class `[]` is not supported")
        if char == "\\":
            out.append("\\x08" if following == "b" else _escaped(following, negated))
            end += 1
        elif char == "-" and end > start and following == "-":
            out.append("-\\-")
            end += 1
        elif char in "[&~" or (char == "-" and end == start):
            out.append("\\" + char)
        else:
            out.append(char)
        end += 1
    text = f"[{'^' if negated else ''}{''.join(out)}]"
    if negated or _NUL.search(pattern, start, end) or "\0" in text:
        text = f"[{text}&&[^\\x00]]"
    return text, end + 1


def _copies(pattern: str) -> int:
    """An upper estimate of how many atoms the expression has once its counted repetitions are written out."""
    stack, atom = [0], 0
    for token in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|\{([0-9]+)(?:,([0-9]*))?\}|.", pattern, re.DOTALL):
        text = token.group()
        if text == "(":
            stack.append(0)
        elif text == ")" and len(stack) > 1:
            atom = max(1, stack.pop())
            stack[-1] += atom
        elif token.group(1) is not None:
            times = int(token.group(2) or token.group(1))
            stack[-1] += atom * max(0, times - 1)
            atom *= max(1, times)
        elif text not in "*+?|":
            atom = 1
            stack[-1] += 1
    return sum(stack)


def none_of(texts: Iterable[str]) -> str:
    """An expression for every text that is none of these."""
    trie: dict[str, dict] = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return f"^(?:{_outside(trie)})$"


def _outside(node: dict[str, dict]) -> str:
    branches = [] if "" in node else [""]
    known = sorted(char for char in node if char)
    others = "[^\\x00" + "".join(_class_member(char) for char in known) + "]"
    branches.append(f"{others}(?s:.*)")
    branches += [f"{re.escape(char)}(?:{_outside(node[char])})" for char in known]
    return "|".join(branches)


def _class_member(char: str) -> str:
    return f"\\u{{{ord(char):x}}}"


def literal_start(pattern: str) -> str:
    """The text that everything the expression matches begins with, as far as it is plain to see."""
    found = re.match(r"\^((?:[a-zA-Z0-9_:/ -]|\\[./:-])*)", pattern)
    if not found or "|" in pattern:
        return ""
    text, following = found.group(1), pattern[found.end() : found.end() + 1]
    text = re.sub(r"\\(.)", r"\1", text)
    return text[:-1] if following in tuple("*?{+") else text
