"""What can go wrong in the demo, apart from the fleet's own errors.

DemoError
├── LearnerFailed      the learner met an error of its own; carries it as text
└── LearnerDied        the learner's process is gone without a word
"""


class DemoError(Exception):
    """The root of the demo's errors."""


class LearnerFailed(DemoError):
    """The learner met an error of its own and stopped.

    Args:
        text: its traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(f"the learner failed:\n{text.rstrip()}")
        self.text = text

    def __reduce__(self) -> tuple[type["LearnerFailed"], tuple[str]]:
        return (type(self), (self.text,))


class LearnerDied(DemoError):
    """The learner's process is gone.

    Args:
        exit_code: its exit status, negative for a signal; None where it closed its pipe and still runs.
        log: file that holds what it wrote.
    """

    def __init__(self, exit_code: int | None, log: str) -> None:
        how = "closed its pipe" if exit_code is None else f"ended with exit status {exit_code}"
        super().__init__(f"the learner's process {how}; what it wrote is in {log}")
        self.exit_code = exit_code
        self.log = log

    def __reduce__(self) -> tuple[type["LearnerDied"], tuple[int | None, str]]:
        return (type(self), (self.exit_code, self.log))
