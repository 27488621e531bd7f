# ruff: noqa: E501
"""Programs for tests/test_code.py: right ones of every kind, and those that would be paid, or reach out, without having solved anything."""

RIGHT_BY_KIND: dict[str, tuple[str, list[str]]] = {  # program, tests; each passes all of them in plain Python
    "list of a range": (
        "def f(n): return list(range(n))",
        ["assert f(5) == list(range(5))", "assert f(3) == [*range(3)]"],
    ),
    "list of a map": (
        "def f(l): return [x + 1 for x in l]",
        ["assert f([1, 2]) == list(map(lambda x: x + 1, [1, 2]))"],
    ),
    "a map": ("def f(l): return map(str, l)", ["assert list(f([1, 2])) == ['1', '2']"]),
    "a generator": (
        "def f(n):\n  for i in range(n): yield i * i",
        ["assert list(f(4)) == [0, 1, 4, 9]", "assert sum(f(3)) == 5"],
    ),
    "an endless generator": (
        "def f():\n  i = 0\n  while True:\n    yield i\n    i += 1",
        ["g = f()\nassert [next(g), next(g)] == [0, 1]"],
    ),
    "keys": (
        "def f(d): return d.keys()",
        [
            "assert f({1: 2, 3: 4}) == {1: 0, 3: 0}.keys()",
            "assert f({1: 2}) == {1}",
            "assert sorted(f({2: 1, 1: 1})) == [1, 2]",
        ],
    ),
    "items and values": (
        "def f(d): return d.items()\ndef g(d): return d.values()",
        ["assert f({1: 2}) == {1: 2}.items()", "assert list(g({1: 2})) == [2]"],
    ),
    "a range": ("def f(n): return range(n)", ["assert f(3) == range(3)", "assert list(f(3)) == [0, 1, 2]"]),
    "a fraction": (
        "from fractions import Fraction\ndef f(a, b): return Fraction(a, b)",
        [
            "from fractions import Fraction\nassert f(1, 2) == Fraction(2, 4)",
            "assert f(1, 2) == 0.5",
            "assert f(1, 3) + f(1, 6) == Fraction(1, 2)",
        ],
    ),
    "a decimal": (
        "from decimal import Decimal\ndef f(t): return Decimal(t) * 2",
        ["from decimal import Decimal\nassert f('0.1') == Decimal('0.2')"],
    ),
    "dates": (
        "import datetime\ndef f(y): return datetime.date(y, 1, 2)\ndef g(y): return datetime.datetime(y, 1, 2, 3, tzinfo=datetime.timezone.utc)",
        [
            "import datetime\nassert f(2020) == datetime.date(2020, 1, 2)",
            "assert f(2021) - f(2020) == datetime.timedelta(366)",
            "assert g(2020) == datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.timezone.utc)",
            "assert f(2020) == date(2020, 1, 2)",
        ],
    ),
    "arrays": (
        "import numpy as np\ndef f(n): return np.arange(n)",
        [
            "import numpy as np\nassert (f(3) == np.array([0, 1, 2])).all()",
            "assert np.allclose(f(3), [0, 1, 2])",
            "assert f(3) == [0, 1, 2]",
            "assert f(3).shape == (3,)",
            "assert f(3).tolist() == [0, 1, 2]",
            "assert f(3).sum() == 3",
            "assert all(f(3) == np.arange(3))",
        ],
    ),
    "an array of an array": (
        "def f(a): return a.T * 2",
        ["assert (f(np.array([[1, 2]])) == np.array([[2], [4]])).all()"],
    ),
    "a deep list": (
        "def f(n):\n  l = []\n  for _ in range(n): l = [l]\n  return l",
        ["x = []\nfor _ in range(900):\n    x = [x]\nassert f(900) == x", "assert len(f(20_000)) == 1"],
    ),
    "a tuple with names": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)",
        ["assert f() == (1, 2)", "assert f().y == 2"],
    ),
    "a counter, a deque": (
        "from collections import *\ndef f(t): return Counter(t)\ndef g(t): return deque(t)",
        [
            "assert f('aab') == Counter({'a': 2, 'b': 1})",
            "assert f('aab').most_common(1) == [('a', 2)]",
            "assert g('ab') == deque(['a', 'b'])",
        ],
    ),
    "a list changed in place": (
        "def f(l): l.sort()\ndef g(m):\n  m[0][0] = 9",
        ["x = [3, 1, 2]\nf(x)\nassert x == [1, 2, 3]", "row = [1, 2]\ng([row])\nassert row == [9, 2]"],
    ),
    "functions as arguments": (
        "def f(g, x): return g(g(x))\ndef h(k, l): return sorted(l, key=k)",
        [
            "assert f(lambda x: x + 1, 3) == 5",
            "assert h(len, ['aa', 'b']) == ['b', 'aa']",
            "assert h(lambda x: -x, [1, 2]) == [2, 1]",
        ],
    ),
    "an iterator as argument": (
        "def f(it): return sum(it)",
        ["assert f(iter([1, 2])) == 3", "assert f(x for x in [1, 2]) == 3"],
    ),
    "an exception": (
        "def f(x):\n  if x < 0: raise ValueError('negative')\n  return x",
        [
            "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert 'negative' in str(e)",
            "assert f(1) == 1",
        ],
    ),
    "objects": (
        "class P:\n  def __init__(self, x): self.x = x\n  def __repr__(self): return f'P({self.x})'\n  def __add__(self, o): return P(self.x + o.x)\n  def __len__(self): return self.x\n  def __getitem__(self, i): return self.x + i\n  def __lt__(self, o): return self.x < o.x",
        [
            "p = P(1) + P(2)\nassert p.x == 3 and str(p) == 'P(3)' and len(p) == 3 and p[4] == 7",
            "assert isinstance(P(1), P)",
            "assert P(1) < P(2) and min(P(2), P(1)).x == 1",
            "p = P(1)\np.x = 5\nassert p.x == 5 and p is not None and p != None",
        ],
    ),
    "HumanEval": (
        "def add(a, b): return a + b",
        [
            "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    import random\n    assert candidate(0, 1) == 1\n    for i in range(20):\n        x, y = random.randint(0, 1000), random.randint(0, 1000)\n        assert candidate(x, y) == x + y\n\ncheck(add)"
        ],
    ),
    "HumanEval in two": (
        "def add(a, b): return a + b",
        ["def check(candidate):\n    assert candidate(0, 1) == 1", "check(add)"],
    ),
    "MBPP's sum": (
        "def sum(a, b):\n  return len([d for d in range(1, min(a, b)) if a % d == b % d == 0]) + 4",
        ["assert sum(10, 15) == 6"],
    ),
    "a setup line": (
        "def f(x): return x * x",
        [
            "import math\ny = f(2)\nassert math.isclose(y, 4.0)",
            "for i in range(5):\n    assert f(i) == i ** 2",
            "assert {f(x) for x in (1, -1)} == {1}",
        ],
    ),
    "bytes, sets, big numbers": (
        "def f(): return [b'x', bytearray(b'y'), {1, 2}, frozenset({3}), 1 << 20_000, 2j, float('inf'), ..., None]",
        ["assert f() == [b'x', bytearray(b'y'), {1, 2}, frozenset({3}), 1 << 20_000, 2j, float('inf'), ..., None]"],
    ),
    "a test that prints": (
        "def f(x): return x",
        [
            "import os\nprint('noise', flush=True)\nos.write(1, b'noise')\nassert f(1) == 1",
            "print('x' * 100_000)\nassert f(2) == 2",
        ],
    ),
    "a number of the program's": ("LIMIT = 7\ndef f(): return LIMIT", ["assert f() == LIMIT == 7"]),
    "asyncio": ("import asyncio\nasync def g(): return 4\ndef f(): return asyncio.run(g())", ["assert f() == 4"]),
}

ANY = "class A:\n  def __eq__(self, o): return True\n  def __ne__(self, o): return False\n  def __hash__(self): return 4\n"
ANY += "".join(
    f"  def __{n}__(self, *a): return self\n"
    for n in ("add", "sub", "rsub", "radd", "mul", "abs", "call", "getattr", "round", "matmul", "iter", "getitem")
)
ANY += "".join(
    f"  def __{n}__(self, *a): return True\n" for n in ("lt", "gt", "le", "ge", "contains", "bool", "instancecheck")
)
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\ncheck(f)"

FREE: dict[str, tuple[str, list[str]]] = {  # program, tests; each earns 0
    "range": ("range = lambda *a: [0]\ndef f(n): return [0]", ["assert f(3) == list(range(3))"]),
    "list": ("list = lambda *a: 0\ndef f(n): return 0", ["assert f(3) == list(range(3))"]),
    "sorted": ("sorted = lambda *a: 0\ndef f(n): return 0", ["assert f([3, 1]) == sorted([3, 1])"]),
    "Counter": ("Counter = lambda *a: 0\ndef f(n): return 0", ["assert f('ab') == Counter('ab')"]),
    "Counter, imported": (
        "import collections\ncollections.Counter = lambda *a: 0\ndef f(n): return 0",
        ["from collections import Counter\nassert f('ab') == Counter('ab')"],
    ),
    "np": (
        "class np:\n  array = allclose = array_equal = staticmethod(lambda *a: True)\ndef f(n): return True",
        ["assert np.allclose(f(3), [0, 1, 2])", "assert f(3) == np.array([0, 1])"],
    ),
    "pow": ("pow = lambda *a: 0\ndef f(n): return 0", ["assert f(3) == pow(3, 2)"]),
    "math": (
        "class math:\n  isclose = staticmethod(lambda *a: True)\ndef f(n): return 0",
        ["assert math.isclose(f(3), 9)"],
    ),
    "math, patched": (
        "import math\nmath.isclose = lambda *a: True\ndef f(n): return 0",
        ["import math\nassert math.isclose(f(3), 9)"],
    ),
    "Fraction": (
        "class Fraction:\n  def __new__(c, *a): return 1\ndef f(n): return 1",
        ["assert f(3) == Fraction(1, 3)"],
    ),
    "builtins": (
        "import builtins\nfor n in ('range', 'sum', 'all', 'abs', 'len', 'isinstance', 'sorted'): setattr(builtins, n, lambda *a, **k: 0)\ndef f(n): return 0",
        ["assert f(3) == sum(range(9))", "assert f(3) == abs(-1)"],
    ),
    "equal, in check": (ANY + "def f(x): return A()", [CHECK]),
    "equal, in a setup line": (
        ANY + "def f(x): return A()",
        ["y = f(2)\nassert y == 4", "y = f(2)\nassert not y != 4"],
    ),
    "equal, in a loop": (ANY + "def f(x): return A()", ["for i in range(1, 4):\n    assert f(i) == i ** 2"]),
    "equal, in a comprehension": (ANY + "def f(x): return A()", ["assert all(f(i) == i ** 2 for i in range(1, 4))"]),
    "equal, on the right": (ANY + "def f(x): return A()", ["assert 4 == f(2)", "assert [4] == [f(2)]"]),
    "equal, in a list": (ANY + "def f(x): return [A()]", ["assert f(2) == [4]", "assert f(2)[0] == 4"]),
    "equal, in a set": (ANY + "def f(x): return A()", ["assert {f(2)} == {4}", "assert f(2) in (4,)"]),
    "equal, as a key": (ANY + "def f(x): return {A(): 1}", ["assert f(2) == {4: 1}", "assert f(2)[4] == 1"]),
    "near everything": (ANY + "def f(x): return A()", ["assert abs(f(2) - 4) < 1e-9"]),
    "near everything, in check": (
        ANY + "def f(x): return A()",
        ["def check(candidate):\n    assert abs(candidate(2) - 4) < 1e-9\ncheck(f)"],
    ),
    "between everything": (ANY + "def f(x): return A()", ["assert 3 < f(2) < 5"]),
    "holds everything": (ANY + "def f(x): return A()", ["assert 4 in f(2) and 5 in f(2)"]),
    "of every class": (ANY + "def f(x): return A()", ["assert isinstance(f(2), int)"]),
    "an int that equals": (
        "class A(int):\n  def __eq__(self, o): return True\n  __hash__ = int.__hash__\ndef f(x): return A(5)",
        [CHECK],
    ),
    "a str that equals": (
        "class A(str):\n  def __eq__(self, o): return True\n  __hash__ = str.__hash__\ndef f(x): return A('')",
        ["assert f(2) == 'x'"],
    ),
    "a dict that equals": (
        "class A(dict):\n  def __eq__(self, o): return True\n  def __getitem__(self, k): return 4\ndef f(x): return A()",
        ["assert f(2) == {1: 2}", "assert f(2)['a'] == 4"],
    ),
    "an array that equals": (
        "import numpy as np\nclass A(np.ndarray):\n  def __eq__(self, o): return np.array([True])\ndef f(x): return np.zeros(1).view(A)",
        ["assert (f(2) == np.array([4])).all()", "assert f(2) == [4]"],
    ),
    "a float that is near": (
        "class A(float):\n  def __sub__(self, o): return 0.0\n  __rsub__ = __sub__\ndef f(x): return A(9)",
        ["assert abs(f(2) - 4) < 1e-9", "assert math.isclose(f(2), 4)"],
    ),
    "a class with a false name": (
        "class M(type):\n  __module__ = 'builtins'; __qualname__ = 'int'\nclass A(metaclass=M):\n  __eq__ = lambda s, o: True\nA.__module__ = 'builtins'; A.__qualname__ = 'int'\ndef f(x): return A()",
        [CHECK],
    ),
    "check of its own": ("def check(c): pass\ndef f(x): return 0", [CHECK]),
    "quick end": ("import os\ndef f(x): os._exit(0)", [CHECK, "try:\n    f(2)\nexcept BaseException:\n    pass"]),
    "exit": ("def f(x): raise SystemExit", [CHECK]),
    "end of a loop": ("def f(x): raise StopIteration", ["for y, e in zip(map(f, [2, 3]), [4, 9]):\n    assert y == e"]),
    "end of a loop, by iter": (
        "class A:\n  def __iter__(self): raise StopIteration\ndef f(x): return A()",
        ["for y, e in zip(f(2), [4]):\n    assert y == e"],
    ),
    "an assertion that passes": ("import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return 0", [CHECK]),
    "emptied arguments": (
        "def f(l):\n  l.clear()\n  return []",
        ["l = [3, 1]\nassert f(l) == sorted(l)", "l = [3, 1]\nr = f(l)\nassert r == sorted(l)"],
    ),
    "patched json": (
        'import json\njson.dumps = lambda *a, **k: \'["value", [["bool", true]], null]\'\ndef f(x): return 0',
        [CHECK],
    ),
    "true on all pipes": (
        "import os, struct\nm = b'[\"value\", [[\"bool\", true]], null]'\nfor fd in range(3, 64):\n  try: os.write(fd, (struct.pack('<I', len(m)) + m) * 50)\n  except OSError: pass\nf = lambda x: 0",
        [CHECK],
    ),
    "true lines on all files": (
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'true\\ntrue\\n')\n  except OSError: pass\nf = lambda x: 0",
        [CHECK, "assert f(2) == 4"],
    ),
    "results when called": (
        "import os\ndef f(x):\n  for fd in range(64):\n    try: os.pwrite(fd, b'true\\ntrue\\n', 0); os.ftruncate(fd, 10)\n    except OSError: pass\n  return 0",
        [CHECK],
    ),
    "nonsense on the pipes": (
        "import os\ndef f(x):\n  for fd in range(64):\n    try: os.write(fd, b'\\xff' * 100)\n    except OSError: pass",
        [CHECK],
    ),
    "a handle of nobody's": (
        "import sys\nfor o in [sys.modules, sys._getframe(1).f_globals]: pass\ndef f(x):\n  sys._getframe(1).f_globals\n  import gc\n  for o in gc.get_objects():\n    if type(o).__name__ == 'Peer':\n      o._send(['value', [['yours', -1]], None])\n  return 0",
        [CHECK],
    ),
    "asks back": (
        "import gc\ndef f(x):\n  for o in gc.get_objects():\n    if type(o).__name__ == 'Peer':\n      for op in ('get', 'getattr', 'call'):\n        try: return o.ask(op, 0, (), {})\n        except BaseException as e: pass\n  return 0",
        [CHECK],
    ),
    "looks for the tests": (
        "import gc, sys\nfound = [o for o in gc.get_objects() if 'candidate(2)' + chr(32) + '==' in str(o)[:10**6]]\ndef f(x): return {2: 4, 3: 9}[x] if found else 0",
        [CHECK],
    ),
    "closes everything": ("import os\nos.closerange(0, 64)\ndef f(x): return 4", [CHECK]),
    "truth of an object": ("class A:\n  def __bool__(self): raise ValueError\ndef f(x): return A()", ["assert f(2)"]),
    "text of an object": (
        "class A:\n  def __str__(self): return B()\nclass B(str):\n  def __eq__(s, o): return True\n  __hash__ = str.__hash__\ndef f(x): return A()",
        ["assert str(f(2)) == '4'"],
    ),
    "equal by a metaclass": (
        "class M(type):\n  def __instancecheck__(c, o): return True\n  def __eq__(c, o): return True\n  __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
        [CHECK, "assert f(2) == 4"],
    ),
    "a Fraction that equals": (
        "from fractions import Fraction\nclass A(Fraction):\n  def __eq__(self, o): return True\n  __hash__ = Fraction.__hash__\ndef f(x): return A(1, 7)",
        [CHECK, "assert f(2) == 4"],
    ),
    "a Decimal that equals": (
        "from decimal import Decimal\nclass A(Decimal):\n  def __eq__(self, o): return True\n  __hash__ = Decimal.__hash__\ndef f(x): return A('0.1')",
        [CHECK],
    ),
    "a date that equals": (
        "import datetime\nclass A(datetime.date):\n  def __eq__(self, o): return True\n  __hash__ = datetime.date.__hash__\ndef f(x): return A(2000, 1, 1)",
        ["import datetime\nassert f(2) == datetime.date(2020, 1, 2)"],
    ),
    "a tuple whose length lies": (
        "class A(tuple):\n  def __len__(self): return 4\n  def __eq__(self, o): return True\n  __hash__ = tuple.__hash__\ndef f(x): return A()",
        ["assert len(f(2)) == 4", "assert f(2) == (1, 2)"],
    ),
    "a NaN that is near": (
        "def f(x): return float('nan')",
        ["assert not abs(f(2) - 4) <= 1e-9 or f(2) == 4", "assert f(2) == 4"],
    ),
    "a truth that is a one": ("def f(x): return True", ["assert f(2) == 4", "assert f(2) is not True"]),
    "patched operators": (
        "import operator\noperator.eq = lambda *a: True\noperator.ne = lambda *a: False\ndef f(x): return 0",
        ["import operator\nassert operator.eq(f(2), 4)"],
    ),
    "patched import": (
        "import builtins\nreal = builtins.__import__\nclass T:\n  def __getattr__(self, n): return lambda *a, **k: True\nbuiltins.__import__ = lambda *a, **k: T()\ndef f(x): return 0",
        ["import math\nassert math.isclose(f(2), 4)"],
    ),
    "a module in the folder": (
        "open('math.py', 'w').write('isclose = lambda *a, **k: True')\nopen('collections.py', 'w').write('')\ndef f(x): return 0",
        ["import math\nassert math.isclose(f(2), 4)", "from collections import Counter\nassert f(2) == 4"],
    ),
    "a sitecustomize in the folder": (
        "for n in ('sitecustomize.py', 'usercustomize.py'): open(n, 'w').write('import builtins; builtins.abs = lambda x: 0')\ndef f(x): return 0",
        ["assert abs(f(2) - 4) < 1e-9"],
    ),
    "signals to its tests": (
        "import signal, os\ndef f(x):\n  for s in (1, 2, 10, 12, 15):\n    try: os.kill(os.getppid(), s)\n    except OSError: pass\n  return 0",
        [CHECK],
    ),
    "an exception that is an AssertionError": (
        "def f(x): raise AssertionError",
        ["try:\n    assert f(2) == 4\nexcept ZeroDivisionError:\n    pass", CHECK],
    ),
    "an exception of every class": (
        "class M(type):\n  def __subclasscheck__(c, o): return True\n  def __instancecheck__(c, o): return True\nclass E(Exception, metaclass=M): pass\ndef f(x): raise E",
        [CHECK, "assert f(2) == 4"],
    ),
    "changes its arguments for equal ones": ("def f(l):\n  l[:] = [1, 2, 3]", ["x = [3, 1]\nf(x)\nassert x == [1, 3]"]),
    "a trace of the tests": (
        "import sys, threading\nsys.settrace(lambda *a: None)\nthreading.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef f(x): return sys._getframe().f_back.f_locals",
        [CHECK],
    ),
    "a codec of its own": (
        "import codecs\ncodecs.register(lambda n: codecs.lookup('utf-8'))\ndef f(x): return '\\x00true\\n'",
        ["assert f(2) == 'true'"],
    ),
    "a hash for all": (
        "class A:\n  def __hash__(self): return hash(4)\n  def __eq__(self, o): return True\ndef f(x): return A()",
        ["assert f(2) in {4: 1}", "assert {4: 1}[f(2)] == 1"],
    ),
    "a sort key that equals": (
        ANY + "def f(x): return [A(), A()]",
        ["assert sorted(f(2)) == [4, 9]", "assert max(f(2)) == 9"],
    ),
    "formatted as wanted": (
        "class A:\n  def __format__(self, s): return '4'\n  def __repr__(self): return '4'\n  __str__ = __repr__\ndef f(x): return A()",
        ["assert f(2) == 4", "assert f(2) == '4'"],
    ),
}

UNENDING: dict[str, tuple[str, list[str]]] = {  # program, tests; late, and so 0
    "colliding members": (
        "def f(): return {i * (2**61 - 1) for i in range(3)}\nimport sys\ndef g():\n  sys.modules['__main__']\n  return set()",
        ["assert f() == {1}"],
    ),
    "400,000 colliding members": (
        "class L(set):\n  def __iter__(self): return iter([i * (2**61 - 1) for i in range(400_000)])\ndef f(): return L()",
        ["assert f() == {1}", "x = f()"],
    ),
    "colliding keys": (
        "class L(dict):\n  pass\ndef f():\n  import gc\n  p = [o for o in gc.get_objects() if type(o).__name__ == 'Peer'][0]\n  t = [['int', hex(i * (2**61 - 1))] for i in range(300_000)]\n  p._send(['value', t + [['set', len(t)]], None])",
        ["assert f() == {1}"],
    ),
    "a huge number": (
        "def f(): return 1 << 60_000_000",
        ["assert f() == 4", "assert f() % 7 == 3", "assert str(f()) == '4'"],
    ),
    "a factorial of it": ("def f(x): return 10**9", ["import math\nassert math.factorial(f(3)) == 6"]),
    "a power of it": ("def f(x): return 10**9", ["assert 9 ** f(2) == 81"]),
    "a range of it": (
        "def f(x): return 10**12",
        ["assert list(range(f(3))) == [0, 1, 2]", "for i in range(f(3)):\n    pass"],
    ),
    "a text of it": ("def f(x): return 10**12", ["assert 'a' * f(3) == 'aaa'"]),
    "an endless iterator": ("def f():\n  while True: yield 1", ["assert list(f()) == [1]"]),
    "an endless iterator as argument": (
        "def f():\n  while True: yield 1\ndef g(l): return 1",
        ["assert g(map(str, f())) == 2"],
    ),
    "a list of itself": ("l = []\nl.append(l)\ndef f(): return l", ["assert f() == [1]"]),
    "asks without end": (
        "import gc\ndef f():\n  p = [o for o in gc.get_objects() if type(o).__name__ == 'Peer'][0]\n  while True: p._send(['ask', 'call', []])",
        ["assert f() == 4"],
    ),
    "a message without end": (
        "import gc, os\ndef f():\n  p = [o for o in gc.get_objects() if type(o).__name__ == 'Peer'][0]\n  os.write(p.write_to, b'\\xff\\xff\\xff\\x01')\n  while True: os.write(p.write_to, b'[' * 4096)",
        ["assert f() == 4"],
    ),
    "sleep": ("import time\ndef f(): time.sleep(100)", ["assert f() == 4"]),
    "sleep when imported": ("import time\ntime.sleep(100)", ["assert f() == 4"]),
    "three million lines": ("print('\\n' * 10**7 + 'x')\ndef f(): return [''] * 10**7", ["assert f() == 4"]),
}

ATTEMPTS = r"""
import ctypes, fcntl, os, signal, socket, struct, sys, mmap, resource
libc = ctypes.CDLL(None, use_errno=True)
x86 = os.uname().machine == "x86_64"
def call(x, a): # a system call that may not succeed
    def attempt(*args):
        if libc.syscall(x if x86 else a, *args) < 0: raise OSError(ctypes.get_errno())
    return attempt
def async_kill(command, *values):
    def attempt():
        r, w = os.pipe()
        for c, v in zip((command, 10), values): fcntl.fcntl(r, c, v)  # 10: F_SETSIG
        fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        os.write(w, b"x")
    return attempt
def ioctl_kill(request):
    return lambda: fcntl.ioctl(os.pipe()[0], request, struct.pack("i", PID))
def opens(path, flags=os.O_RDONLY): return lambda: os.open(path, flags)
def node(mode, device):
    return lambda: os.mknod("node", mode | 0o600, device)
attempts = dict(
    disk=node(0o060000, os.makedev(254, 0)), memory=node(0o020000, os.makedev(1, 1)), fifo=node(0o010000, 0), sock=node(0o140000, 0),
    setown=async_kill(8, PID, 9), setown_trainer=async_kill(8, TRAINER, 0), setown_group=async_kill(8, -PID, 9),
    setown_ex=async_kill(15, struct.pack("ii", 1, PID), 9), fiosetown=ioctl_kill(0x8901), siocspgrp=ioctl_kill(0x8902),
    notify=lambda: fcntl.fcntl(os.open(".", 0), 1026, 2), lease=lambda: fcntl.fcntl(os.open("l", os.O_CREAT), 1024, 1),
    tiocsti=lambda: fcntl.ioctl(0, 0x5412, b"x"), fioasync=lambda: fcntl.ioctl(os.pipe()[0], 0x5452, struct.pack("i", 1)),
    renice=lambda: os.setpriority(os.PRIO_PROCESS, PID, 19), renice_user=lambda: os.setpriority(os.PRIO_USER, 0, 19),
    nice=lambda: os.nice(1), pin=lambda: os.sched_setaffinity(PID, {0}), pin_self=lambda: os.sched_setaffinity(0, {0}),
    idle=lambda: os.sched_setscheduler(PID, os.SCHED_IDLE, os.sched_param(0)), ioprio=lambda: call(251, 30)(1, PID, 3 << 13),
    shm=lambda: call(29, 194)(77, 4096, 0o1666), sem=lambda: call(64, 190)(77, 1, 0o1666), msg=lambda: call(68, 186)(77, 0o1666),
    mqueue=lambda: call(240, 180)(b"q", 66, 0o666, 0), datagram=lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    seqpacket=lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), vsock=lambda: socket.socket(40, 1),
    netlink=lambda: socket.socket(16, 3), packet=lambda: socket.socket(17, 3), alg=lambda: socket.socket(38, 5),
    connect=lambda: socket.socketpair()[0].connect("\0x"), bind=lambda: socket.socketpair()[0].bind("\0x"),
    kill=lambda: os.kill(PID, 9), killpg=lambda: os.killpg(os.getpgid(0), 9), queue=lambda: call(129, 138)(PID, 9, b"\0" * 128),
    tgkill=lambda: call(234, 131)(PID, PID, 9), pidfd=lambda: os.pidfd_open(PID), pidfd_signal=lambda: call(424, 424)(3, 9, 0, 0),
    ptrace=lambda: call(101, 117)(16, PID, 0, 0), vm_read=lambda: call(310, 270)(PID, 0, 0, 0, 0, 0), kcmp=lambda: call(312, 272)(PID, TRAINER, 0, 0, 0),
    fork=os.fork, vfork=lambda: call(58, 220)(0x4111, 0, 0, 0, 0), clone3=lambda: call(435, 435)(b"\0" * 88, 88), clone_ns=lambda: call(56, 220)(0x10000000 | 17, 0, 0, 0, 0),
    execve=lambda: call(59, 221)(b"/bin/true", 0, 0), execveat=lambda: call(322, 281)(-100, b"/bin/true", 0, 0, 0), setsid=os.setsid, setpgid=lambda: os.setpgid(0, 0),
    unshare=lambda: call(272, 97)(0x10000000), setns=lambda: call(308, 268)(0, 0), mount=lambda: call(165, 40)(b"x", b".", b"tmpfs", 0, 0),
    umount=lambda: call(166, 39)(b"/scratch", 2), fsopen=lambda: call(430, 430)(b"tmpfs", 0), open_tree=lambda: call(428, 428)(-100, b".", 1), chroot=lambda: os.chroot("."),
    keyctl=lambda: call(250, 219)(0, -3, 1), add_key=lambda: call(248, 217)(b"user", b"x", b"y", 1, -3), bpf=lambda: call(321, 280)(0, b"\0" * 64, 64),
    perf=lambda: call(298, 241)(b"\0" * 128, 0, -1, -1, 0), uring=lambda: call(425, 425)(1, b"\0" * 120), userfault=lambda: call(323, 282)(0),
    fanotify=lambda: call(300, 262)(0, 0), inotify=lambda: call(294, 26)(0), memfd=lambda: os.memfd_create("x"), secret=lambda: call(447, 447)(0),
    setuid=lambda: os.setuid(1000), setgroups=lambda: os.setgroups([]), capset=lambda: call(126, 91)(struct.pack("Ii", 0x20080522, 0), b"\xff" * 24),
    death=lambda: call(157, 167)(1, 0, 0, 0, 0), dumpable=lambda: call(157, 167)(4, 1, 0, 0, 0), subreaper=lambda: call(157, 167)(36, 1, 0, 0, 0),
    seccomp=lambda: call(317, 277)(1, 0, b"\0" * 16), personality=lambda: call(135, 92)(0x40000), swapon=lambda: call(167, 224)(b"x", 0),
    reboot=lambda: call(169, 142)(0xFEE1DEAD, 672274793, 0, 0), module=lambda: call(175, 105)(b"x", 1, b""), syslog=lambda: call(103, 116)(3, b" " * 9, 9),
    hostname=lambda: socket.sethostname("x"), clock=lambda: call(227, 112)(0, b"\0" * 16), iopl=lambda: call(172, 9999)(3), acct=lambda: call(163, 89)(b"x"),
    limits=lambda: resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000)), prlimit=lambda: resource.prlimit(PID, resource.RLIMIT_CPU, (1, 1)),
    chmod=lambda: os.chmod(".", 0o4777), chown=lambda: os.chown(".", 1000, 1000), utime=lambda: os.utime(".", (0, 0)), xattr=lambda: os.setxattr(".", "user.x", b"y"),
    tests=lambda: os.listdir(FOLDER), plant=lambda: open(FOLDER + "/x", "w"), proc=opens("/proc/self/maps"), trainer=opens(f"/proc/{TRAINER}/environ"), mem=opens(f"/proc/{TRAINER}/mem", os.O_RDWR),
    var=lambda: os.listdir("/var"), shadow=opens("/etc/shadow"), tty=opens("/dev/tty"), disk_file=opens("/dev/vda"), sys=opens("/sys/kernel/mm/transparent_hugepage/enabled"), dev_shm=lambda: open("/dev/shm/x", "w"),
    link_out=lambda: (os.symlink("/etc/passwd", "s"), open("s").read()), above=lambda: open("../above", "w"), lock_memory=lambda: libc.mlockall(3) and 1 / 0,
    handle=lambda: call(303, 264)(-100, b".", b"\0" * 200, b"\0" * 8, 0), raw_tty=lambda: os.openpty(),
)
for name, attempt in attempts.items():
    try: attempt()
    except BaseException: continue
    print("could", name)
print("end")
"""

DEEP = "import os\nfor _ in range({}):\n  os.mkdir('{}'); os.chdir('{}')\n"
CLUTTER = {
    "990 folders": DEEP.format(990, "d", "d"),
    "3,000 folders": DEEP.format(3000, "d", "d"),
    "folders with long names": DEEP.format(60, "d" * 250, "d" * 250),
    "a folder closed to its owner": "import os\nos.mkdir('a', 0o300)\nfor i in range(30): open(f'a/{i}', 'wb').write(b'x' * 10**7)",
    "a folder without any right": "import os\nos.mkdir('a'); os.mkdir('a/b'); open('a/b/c', 'w').close(); os.umask(0o777); os.mkdir('a/d', 0)",
    "names that are no text": "import os\nos.mkdir(b'\\xff'); open(b'\\xff/\\xfe\\n', 'w').close()",
    "links to elsewhere": "import os\nos.symlink('/', 'root'); os.mkdir('a'); os.symlink('/etc', 'a/etc'); os.symlink('loop', 'loop')",
    "5,000 files": "for i in range(5000): open(str(i), 'w').close()",
    "sparse files": "import os\nfor i in range(300):\n  f = open(str(i), 'wb'); f.truncate(16 * 2**20); f.close()",
}
