r"""From the text of a completion to a verdict on its answer, in the order of the files below.

extraction (which text is the answer) -> cleaning -> tokens -> formulas -> quantities -> answers: the last three are one grammar,
of expressions, of numbers with units, and of lists, sets and relations of these; relations and containers say what its parts make
together. reading puts them in order: `read("x = 5")` is a typed value (values), or says why there is none. equivalence compares
two values by type, and expressions two trees by their numbers.
"""
