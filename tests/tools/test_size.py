from pathlib import Path

from tools.size import cpp_functions, python_functions, sizes

CPP = r"""
#define SKIPPED(x) \
  do { x; } while (0)
namespace a {
struct S {
  int method() const {
    return 1;
  }
  S() : x{1} {}
  int x;
};
constexpr const char* kNames[] = {"{", "}"};
template <typename T>
static T twice(T x) {  // a brace in a comment {
  for (int i = 0; i < 2; ++i) {
    if (x) x += 1'000;
  }
  const auto f = [&](int y) { return y; };
  return f(x);
}
enum class E { a, b };
}  // namespace a
int main() { return a::twice(0); }
"""


def test_cpp_functions():
    assert cpp_functions(CPP) == [("method", 6, 3), ("S", 9, 1), ("twice", 13, 8), ("main", 23, 1)]


def test_python_functions():
    text = (
        "@decorated\ndef f():\n    def g():\n        pass\n    return g\n\n"
        "class A:\n    async def h(self):\n        pass\n"
    )
    assert sorted(python_functions(text)) == [("f", 2, 4), ("g", 3, 2), ("h", 8, 2)]


def test_limits():
    long_function = "def f():\n" + "    x = 1\n" * 60
    over = [s for s in sizes(Path("a.py"), long_function) if s.lines > s.limit]
    assert [(s.what, s.lines, s.limit) for s in over] == [("function", 61, 60)]
    over = [s for s in sizes(Path("a.py"), "x = 1\n" * 501) if s.lines > s.limit]
    assert [(s.what, s.lines, s.limit) for s in over] == [("file", 501, 500)]


def test_kernels_may_be_longer():
    body = "void f() {\n" + "  x();\n" * 98 + "}\n"
    limit = {
        path: [s.limit for s in sizes(Path(path), body) if s.what == "function"] for path in ("a.cpp", "a_avx2.cpp")
    }
    assert limit == {"a.cpp": [80], "a_avx2.cpp": [150]}
