"""What is no tensor is checked here, before an operator's schema would refuse it in words of its own."""

from torch import Tensor

OPTIONAL = (Tensor, type(None))


def expect(kind: type | tuple[type, ...], **arguments) -> None:
    """Every argument must be an instance of the class, or of one of the classes."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            named = (each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            kinds = " or ".join("None" if each == "NoneType" else each for each in named)
            raise TypeError(f"{name} must be of type {kinds}, got {type(value).__name__}")


def two_biases(bias: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """(of the first product, of the second); either may be None."""
    if not isinstance(bias, tuple | list) or len(bias) != 2:
        got = f"{len(bias)} of them" if isinstance(bias, tuple | list) else type(bias).__name__
        raise TypeError(f"bias must be a pair of tensors or None, got {got}")
    return bias
