"""Language consistency: does the model think in the language of the question?"""

from __future__ import annotations

import re

_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LATIN = "a-zA-Z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_SIGNS = "\u00aa\u00b2\u00b3\u00b9\u00ba\u00bc-\u00be\u2070-\u209f\u2100-\u218f\u2460-\u24ff\U0001d400-\U0001d7ff"
_WORDS = re.compile(rf"(?P<latin>[{_LATIN}]{{2,}})|(?P<han>[{_HAN}])|(?P<other>[^\W\d_{_HAN}{_LATIN}{_SIGNS}]{{2,}})")
_NO_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$[^$]*\$\$|\$(?=[^$\n]*[\\^_={}])[^$\n]*\$"
    r"|\\\((?:(?!\\[()]).)*\\\)|\\\[(?:(?!\\[\[\]]).)*\\\]|\\[a-zA-Z]+|</?[a-zA-Z_]+>",
    re.DOTALL,
)  # no scan for an end goes past the next beginning: what never ends costs no more


def language(completion: str, question: str) -> float:
    """Share of the words of the thought that are in the script of the question: in [0, 1].

        number of words in the target language / number of words

    DeepSeek-R1 (arXiv 2501.12948v2) adds it to the reward as it is, with weight 1, for R1 and not for R1-Zero; it costs a little
    accuracy. Languages are told apart by script (Latin, Chinese characters and kana, others), so English is not told from
    German. A Chinese character is a word; code, formulas, tags, numbers and single letters are none. The thought is what
    stands before `</think>`, all of it without one. 0 if it has no words: saying nothing must not pay.
    """
    words = _scripts(completion.partition("</think>")[0])
    asked = _scripts(question) or ["latin"]
    target = max(("latin", "han", "other"), key=asked.count)
    return words.count(target) / len(words) if words else 0.0


def _scripts(text: str) -> list[str]:
    """The script of each word."""
    return [str(match.lastgroup) for match in _WORDS.finditer(_NO_WORDS.sub(" ", text))]
