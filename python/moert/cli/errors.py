"""What a command tells its user in one line: wrong paths, models that do not fit, broken files."""


class CommandError(Exception):
    """Ends the command with its text on one line and exit code 2; anything else is a fault of moert and shows where."""


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
