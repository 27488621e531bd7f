"""Words and signs that have a meaning in an answer: units, currencies, numbers in words, Greek letters."""

from __future__ import annotations

from .expressions import FUNCTIONS, word_list

_UNITS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram gm", "kg": "kilogram",
    "lb": "pound lbs", "oz": "ounce", "ton": "tonne", "s": "second sec", "min": "minute mins", "h": "hour hr hrs", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "ml": "milliliter millilitre mL", "L": "liter litre l",
    "cup": "cups", "gal": "gallon", "dollar": "dollars usd USD buck bucks", "cent": "cents", "euro": "euros EUR",
    "yen": "", "rupee": "rupees Rs", "yuan": "元", "个": "",
    "pound sterling": "GBP", "degree": "degrees deg", "radian": "radians rad",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Pa": "pascal", "Hz": "hertz",
    "kW": "kilowatt", "kJ": "kilojoule", "mol": "mole", "unit": "units", "mph": "", "kph": "", "nm": "nanometer", "eV": "",
    "C": "coulomb", "T": "tesla", "F": "farad", "ms": "millisecond", "acre": "acres", "percent": "pct",
}  # fmt: skip
UNITS = {
    word: name for name, words in _UNITS.items() for word in [name, *words.split(), *(w + "s" for w in words.split())]
}
COUNTERS = {"个": "个", "元": "yuan", "米": "m"}
CURRENCIES = {"\\dollar": "dollar", "\\euro": "euro", "\\pounds": "pound sterling", "\\yen": "yen"}
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NUMBER_WORDS = dict(
    zip(
        word_list(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
            "sixteen seventeen eighteen nineteen twenty"
        ),
        range(21),
        strict=True,
    )
)
# words that say something about the number they stand beside; anything else beside a number is what was counted
MEANINGFUL = frozenset(
    word_list(
    "and or not no nor of to from than then if else but maybe perhaps possibly either neither negative "
    "minus plus times over half halves third thirds quarter quarters twice thrice double triple less more "
    "most least about around approximately almost nearly up down between through least mod modulo squared "
    "cubed root point divided by in all any some none only without except plus with true false yes is are "
    "was be equals equal undefined infinite infinity for every each when where while until before after "
    "unless until ago per hundredths tenths thousandths hundredth tenth base prime factorial"
)
) | set(SCALES) | set(NUMBER_WORDS)  # fmt: skip
SAME_WORDS = {
    ("does", "not", "exist"): ("dne",), ("doesn", "t", "exist"): ("dne",), ("t",): ("true",), ("f",): ("false",),
    ("no", "solutions"): ("no", "solution"),
}  # fmt: skip
ARTICLES = frozenset(("a", "an", "the"))
SHORT_WORDS = frozenset(word_list("is it to of by at on if no be we so as an not but per"))
GREEK = frozenset(
    "\\" + name
    for name in word_list(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar"
    )
)
DECORATIONS = frozenset(
    word_list("\\overline \\bar \\dot \\ddot \\vec \\hat \\tilde \\widehat \\overrightarrow \\angle \\triangle")
)


def is_word(word: str) -> bool:
    """Whether letters are a word rather than a product of symbols."""
    if word in FUNCTIONS or word in ("pi", "mod", "infty", "or", "and"):
        return False
    is_alphabet = word.lower() in "abcdefghijklmnopqrstuvwxyz"
    return len(word) > 2 and not is_alphabet
