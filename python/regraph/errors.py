"""The one exception of this package: what rg_error says."""


class RegraphError(RuntimeError):
    """A call of the C library that failed, or one that was refused before it got there.

    status   stable name, such as "RG_E_SHAPE"
    file     file or "" ; `pointer` is a JSON pointer into it, `line` and `column` the place of a syntax error
    node     node of the graph concerned, or ""
    message  one sentence: the offending value and what was expected
    """

    def __init__(self, status, message, *, file="", pointer="", node="", line=0, column=0, text=None):
        super().__init__(text or f"{status}: {message}")
        self.status, self.message = status, message
        self.file, self.pointer, self.node = file, pointer, node
        self.line, self.column = line, column
