"""What is wrong with some data, as a sentence for people that also carries a code for programs."""


class Problem(str):
    """One sentence; `code` says which kind of problem it is, as in the table of `llmga.check.kinds`."""

    __slots__ = ("code",)
    code: str

    def __new__(cls, code: str, text: str) -> "Problem":
        """The sentence `text`, filed under `code`."""
        problem = super().__new__(cls, text)
        problem.code = code
        return problem

    def __reduce__(self) -> tuple[type["Problem"], tuple[str, str]]:
        return Problem, (self.code, str(self))


def sentence_of(error: BaseException) -> str:
    """What an error says; a loading worker wraps it in its own traceback, which is taken off."""
    message = str(error)
    return message.strip().splitlines()[-1].partition(": ")[2] if message.startswith("Caught ") else message
