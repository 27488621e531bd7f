"""Leave out of an answer's text what has no meaning: styles, delimiters, spaces of LaTeX, marks of emphasis."""

from __future__ import annotations

import re

_UNICODE = str.maketrans(
    {
        "\N{MINUS SIGN}": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "⋅": "\\cdot ", "÷": "\\div ",
        "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ",
        "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "λ": "\\lambda ", "μ": "\\mu ", "φ": "\\varphi ", "ω": "\\omega ",
        "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "ℝ": "\\mathbb{R}", "°": "^\\circ ", "²": "^2 ", "³": "^3 ", "√": "\\sqrt ",
        "½": "\\frac12 ", "⅓": "\\frac13 ", "⅔": "\\frac23 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "…": "\\ldots ",
        "（": "(", "）": ")", "［": "[", "］": "]", "｛": "{", "｝": "}", "，": ", ", "、": ", ", "；": "; ", "：": ": ",
        "。": ".", "％": "\\%", "“": '"', "”": '"', "‘": "'", "’": "'", "\xa0": " ",
        "€": "\\euro ", "£": "\\pounds ", "¥": "\\yen ",
    }
)  # fmt: skip
_SPACE = r"(?:(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|[~\s])"
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|strut|mathstrut|therefore|large|Large|LARGE|huge|Huge|small|normalsize|bf|rm|it|sf"
    r"|left(?=\s*[(\[|\\{.])|right(?=\s*[)\]|\\}.])|left(?=\])|right(?=\[)|[bB]igg?[lrm]?)(?![a-zA-Z])\.?"
    r"|\\phantom\s*(?:\{[^{}]*\}|-)|\\color\s*\{[a-zA-Z!0-9]*\}|\\textcolor\s*\{[a-zA-Z!0-9]*\}"
    r"|\\(?:underline|mathbf|boldsymbol|bm|mathit|mathsf|mathnormal|boxed|fbox|operatorname|ensuremath|mathop)(?![a-zA-Z])\s*(?=\{)"
    r"|(?<!\\)\\[\[\]()]|\\begin\{(?:aligned|align\*?|equation\*?|gathered)\}|\\end\{(?:aligned|align\*?|equation\*?|gathered)\}"
)
_THOUSANDS = re.compile(r"(?<![\d.,_^{])\d{1,3}(?:(?:\\,|\\!|,\\!|\{,\}|~|_|\\ | )\d{3})+(?!\d|[.,]\d{1,2}(?!\d))")
TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mbox|mathrm|mathtt)\s*\{([^{}]*)\}")


def clean(text: str) -> str:
    """The text without what has no meaning: styles, delimiters, spaces of LaTeX, marks of emphasis and quotation."""
    text = re.sub(r"√\s*(\d+)", r"\\sqrt{\1}", text) if "√" in text else text  # \sqrt10 is the root of 1, and a 0
    text = text.translate(_UNICODE)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\cfrac", "\\frac")
    text = _STYLE.sub(_blank, text.replace("\\!", ""))
    text = text.replace("\\$", "\\dollar ") if "\\$" in text else text
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else text.replace("$", "\\dollar ")
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = re.sub(rf"{_SPACE}+", " ", text)
    text = TEXT_COMMAND.sub(lambda match: match[0] if match[1].strip() else " ", text)
    while len(text) > 1:
        shorter = _without_wrapping(text.strip(' *`"').strip())
        if shorter == text:
            break
        text = shorter
    return text


def _blank(style: re.Match[str]) -> str:
    r"""A space, so that words stay apart; nothing beside a bracket: f\left(x\right) is f(x)."""
    return "" if re.match(r"\\(?:left|right|[bB]ig)", style[0]) else " "


def _without_wrapping(text: str) -> str:
    if text.endswith((".", ",", ";")) and not text.endswith(("..", "\\,", "\\;")):
        return text[:-1]
    if text.endswith("\\") and not text.endswith("\\\\"):
        return text[:-1]
    if text[:1] == "{" and _closing(text) == len(text) - 1:
        return text[1:-1]
    return text[1:-1] if text[:1] == text[-1:] == "'" and len(text) > 2 else text


def _closing(text: str) -> int:
    depth = 0
    for at, character in enumerate(text):
        if character in "{}" and (at == 0 or text[at - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return at
    return -1
