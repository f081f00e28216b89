"""A scanner of C++ that knows comments, literals and braces: enough to measure functions."""

import re

TOKEN = re.compile(
    r'//[^\n]*'
    r'|/\*.*?\*/'
    r'|R"([^()\\ ]{0,16})\(.*?\)\1"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'",
    re.DOTALL)
SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b")
NAME = re.compile(r"(~?\w+|operator\s*[^\s(]+)\s*\(")


def strip_comments_and_strings(text):
    """The code with comments and literals blanked; lines and columns stay where they are."""

    def blank(match):
        found = match.group(0)
        if found.startswith("/"):
            return re.sub(r"[^\n]", " ", found)
        return found[0] + re.sub(r"[^\n]", " ", found[1:-1]) + found[-1]

    return TOKEN.sub(blank, text)


def functions(text):
    """[(name, first line, last line)] of the function definitions at namespace or class scope."""
    code = strip_comments_and_strings(text)
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group(0)), code,
                  flags=re.MULTILINE)
    found = []
    stack = []  # kinds of the open braces: scope, function, other
    start = 0  # where the current statement began
    current = None
    parens = 0
    for at, char in enumerate(code):
        if char in "()":
            parens += 1 if char == "(" else -1
        elif char == "{":
            head = code[start:at]
            kind = "other"
            if all(k == "scope" for k in stack) and parens == 0:
                plain = re.sub(r"\b(template\s*<[^{;]*>|requires\b[^{;]*)", "", head)
                if SCOPE.search(plain) and not re.search(r"\)\s*(const|noexcept|override|final|->.*)?\s*$", plain):
                    kind = "scope"
                elif "(" in head and not re.search(r"=\s*$", head) and re.search(r"[)\w>&*}]\s*$", head):
                    # `A() : b_{1} {`: the brace after a member name opens an initializer, not the body.
                    initializer = re.search(r"[:,]\s*\w+(<[^{}]*>)?\s*$", head) and re.search(r"\)\s*:", head)
                    kind = "other" if initializer else "function"
            if kind == "function":
                name = NAME.search(head)
                first = start + len(head) - len(head.lstrip())
                current = (name.group(1) if name else "function", code.count("\n", 0, first) + 1)
            stack.append(kind)
            if kind == "scope":
                start = at + 1
        elif char == "}":
            kind = stack.pop() if stack else "other"
            if kind == "function" and current:
                found.append((current[0], current[1], code.count("\n", 0, at) + 1))
                current = None
            if kind in ("function", "scope") and all(k == "scope" for k in stack):
                start = at + 1
        elif char == ";" and parens == 0 and all(k == "scope" for k in stack):
            start = at + 1
    return found
