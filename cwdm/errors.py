"""The one error a person can do something about."""


class InputError(Exception):
    """Something we were given is wrong: a file, a folder, a name, a value.

    `str(error)` is one line that names the thing, what was found and what was expected. The command
    line prints that line and exits with code 2.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())
